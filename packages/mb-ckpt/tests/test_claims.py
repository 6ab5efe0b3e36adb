# SPDX-License-Identifier: Apache-2.0
"""Two jobs do not save in one directory."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore
from mb_ckpt.places import claims

HOLDER = """
import sys, time, torch
from mb_ckpt import CheckpointStore
store = CheckpointStore(sys.argv[1])
store.save(1, {"w": torch.ones(3)}).result()
print("saved", flush=True)
time.sleep(60)
"""


def test_another_process_is_kept_out_until_the_first_one_ends_however_it_ends(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(claims, "PATIENCE_S", 0.2)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "saved\n"
        with CheckpointStore(tmp_path) as store:
            room = torch.zeros(3)
            store.load({"w": room})  # looking is allowed
            assert (room == 1).all()
            handle = store.save(2, {"w": room})
            with pytest.raises(CheckpointError, match="another process is saving in"):
                handle.result()
            assert store.steps() == [1]
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            store.save(3, {"w": room}).result()
            assert store.steps() == [1, 3]


def test_it_waits_a_little_for_one_that_is_about_to_end(tmp_path):
    import threading

    first = CheckpointStore(tmp_path)
    first.save(1, {"w": torch.ones(1)}).result()
    threading.Timer(0.3, first.close).start()
    with CheckpointStore(tmp_path) as second:
        second.save(2, {"w": torch.ones(1)}).result()
        assert second.steps() == [1, 2]


def test_a_store_that_was_dropped_keeps_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PATIENCE_S", 0.2)
    store = CheckpointStore(tmp_path)
    store.save(1, {"w": torch.ones(1)}).result()
    store = CheckpointStore(tmp_path)
    store.save(2, {"w": torch.ones(1)}).result()
    assert store.steps() == [1, 2]
    store.close()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    import errno

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", none)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"w": torch.ones(1)}).result()
    assert "cannot lock" in caplog.text
