# SPDX-License-Identifier: Apache-2.0
"""A writer of its own writes the same, reports what goes wrong, and never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore

PARENT = """
import sys, time, torch
from mb_ckpt import CheckpointStore
store = CheckpointStore(sys.argv[1], writer="process")
store.save(1, {"w": torch.ones(10)}).result()
print(store._saver.process.pid, flush=True)
if sys.argv[2] == "fork":
    import os
    if os.fork() == 0:  # holds the child's input open
        time.sleep(20)
        os._exit(0)
    print("forked", flush=True)
time.sleep(60)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "run", writer="process") as store:
        yield store


@pytest.mark.parametrize("staging", ["eager", "lazy"])
def test_it_writes_what_was_staged_in_states_that_grow_and_shrink(tmp_path, staging):
    with CheckpointStore(tmp_path, writer="process", staging=staging) as store:
        expected = {}
        for step, size in enumerate((10, 500_000, 3, 700_000, 0)):
            expected[step] = torch.randn(size)
            tensor = expected[step].clone()
            store.save(step, {"w": tensor, "n": step}).wait_staged()
            tensor.zero_()
        for step, tensor in expected.items():
            room = torch.empty_like(tensor)
            assert store.load({"w": room}, step) == {"n": step}
            assert torch.equal(room, tensor)
        child = store._saver.process.pid
        assert alive(child)
    assert not alive(child)


def test_both_writers_and_layouts_make_the_same_files(tmp_path):
    state = {"a": torch.arange(5000.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    for layout in ("packed", "zarr"):
        seen = []
        for writer in ("thread", "process"):
            root = tmp_path / layout / writer
            with CheckpointStore(root, writer=writer, layout=layout) as store:
                store.save(1, state)
            (data,) = root.glob("step_*/data-*")
            files = sorted(path for path in data.rglob("*") if path.is_file())
            seen.append({str(p.relative_to(data)): p.read_bytes() for p in files})
        assert seen[0] == seen[1]
        assert len(seen[0]) == (2 if layout == "packed" else 5)


def test_what_the_storage_refuses_is_reported(store, tmp_path, monkeypatch):
    store.save(1, {"w": torch.ones(3)}).result()
    perform = store._saver.process.perform

    def into_a_file(task):
        (tmp_path / "run" / "step_00000002").write_text("in the way")
        return perform(task)

    with monkeypatch.context() as patch:
        patch.setattr(store._saver.process, "perform", into_a_file)
        handle = store.save(2, {"w": torch.ones(3)})
        with pytest.raises(CheckpointError, match=r"step 2 was not saved: rank 0: writing .*tory"):
            handle.result()
    assert store.steps() == [1]
    store.save(3, {"w": torch.ones(3)}).result()
    assert store.steps() == [1, 3]


def test_a_writer_that_dies_fails_its_save_and_the_next_one_has_another(store):
    store.save(1, {"w": torch.ones(3)}).result()
    child = store._saver.process.pid
    os.kill(child, signal.SIGSTOP)
    handle = store.save(2, {"w": torch.ones(3)})
    time.sleep(0.05)
    assert not handle.done()
    os.kill(child, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="the writer process ended with code -9"):
        handle.result(20)
    store.save(3, {"w": torch.full((3,), 3.0)}).result()
    assert store.steps() == [1, 3]
    assert store._saver.process.pid != child
    room = torch.zeros(3)
    store.load({"w": room})
    assert room.tolist() == [3, 3, 3]


@pytest.mark.parametrize("kind", ["plain", "fork"])
def test_it_ends_when_its_parent_is_killed(tmp_path, kind):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path, kind], stdout=subprocess.PIPE, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        forked = kind == "fork" and parent.stdout.readline()
        assert alive(child)
        family = [int(pid) for pid in _children(parent.pid)]
        parent.kill()
        end = time.monotonic() + 10
        while alive(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(child)
        assert bool(forked) == (len(family) > 1)
        for pid in family:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def _children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def test_memory_of_this_process_is_refused():
    with pytest.raises(ValueError, match="cannot write to memory://"):
        CheckpointStore("memory://x", writer="process")
