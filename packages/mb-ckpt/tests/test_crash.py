# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to a writer, the newest committed step loads exactly and no half step shows."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore
from mb_ckpt.saving import writing

MOMENTS = 200
"""At which crash_worker.py kills a process, one of two ranks, or both."""
WORKER = Path(__file__).with_name("crash_worker.py")


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """The directories that killed writers left behind, and how many file operations a save has."""
    root = tmp_path_factory.mktemp("crashed")
    done = subprocess.run(
        [sys.executable, WORKER, root], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return root, int(done.stdout.split()[-1])


def check(root):
    """Load the newest step into garbage, verify all; return the steps."""
    with CheckpointStore(root) as store:
        steps = store.steps()
        for step in steps:
            room = {key: torch.empty(t.shape) for key, t in store.inspect(step).tensors.items()}
            store.load(room, step)
            assert all((v == step + int(k[1:]) / 8).all() for k, v in room.items()), step
            assert len(room) == 6
            store.verify(step)
    return steps


def check_tidy(root):
    for path in root.glob("step_*"):
        names = [entry.name for entry in path.iterdir()]
        assert sum(name.startswith("data-") for name in names) == 1, names
        assert len(names) == 2, names
        assert "manifest.json" in names, names


def test_a_writer_killed_before_any_file_operation_leaves_a_whole_step(crashed):
    root, count = crashed
    assert count > 15
    seen = set()
    for n in range(count):
        run = root / f"operation-{n}"
        steps = check(run)
        assert steps in ([1], [1, 2], [2]), (n, steps)
        seen.add(tuple(steps))
        with CheckpointStore(run) as store:
            store.save(9, {"w": torch.ones(1)}).result()
        check_tidy(run)
        with CheckpointStore(run) as store:
            assert store.steps() == [*steps, 9]
    assert seen == {(1,), (1, 2), (2,)}


def test_a_writer_killed_at_random_moments_leaves_whole_steps(crashed):
    root, _ = crashed
    newest = []
    runs = [run for run in (root / f"moment-{i}" for i in range(MOMENTS)) if run.exists()]
    for run in runs:
        newest += check(run)[-1:]
        with CheckpointStore(run) as store:
            store.save(10_000, {"w": torch.ones(1)}).result()
        check_tidy(run)
    assert len(runs) > MOMENTS * 0.8, "the others were killed before they began"
    assert len(newest) > MOMENTS * 0.4, "most had committed a step"
    assert max(newest) >= 5


def test_a_file_size_limit_is_reported_and_the_next_save_succeeds(crashed):
    root, _ = crashed
    said = (root / "limited" / "said").read_text()
    assert "step 2 was not saved: rank 0: writing" in said
    assert "raise the file size limit" in said
    assert check(root / "limited") == [1, 3]
    check_tidy(root / "limited")


class ShortWrite:
    """A file that takes half of what is written to it."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


PWRITEV = os.pwritev


def failing(left, fault):
    """Return a wrapper whose calls, counted together, fail once at number ``left[0]``."""

    def hooked(call):
        def run(*args, **kwargs):
            left[0] -= 1
            if left[0] != -1:
                return call(*args, **kwargs)
            if fault == "short" and call == Path.open:
                return ShortWrite(call(*args, **kwargs))
            if fault == "short" and call is PWRITEV:
                file, buffers, at = args
                half = b"".join(buffers)
                call(file, [half[: len(half) // 2]], at)
            code = errno.ENOSPC if fault == "short" else fault
            raise OSError(code, os.strerror(code))

        return run

    return hooked


OPERATIONS = [
    (os, "fsync"), (os, "open"), (os, "pwritev"), (shutil, "rmtree"), (writing, "write_array"), (writing, "write_arrays"),
    *((Path, name) for name in ("replace", "unlink", "mkdir", "open")),
]  # fmt: skip


@pytest.mark.parametrize("layout", ["packed", "zarr"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, "short"])
def test_any_file_operation_may_fail_and_the_run_goes_on(tmp_path, monkeypatch, fault, layout):
    """Fail the n-th operation of a save, for every n: the save raises or the step is whole."""
    state = {f"t{i}": torch.full((50,), 2 + i / 8) for i in range(6)}
    failures = n = 0
    while True:
        root, left = tmp_path / str(n), [n]
        hooked = failing(left, fault)
        with CheckpointStore(root, layout=layout) as store:
            store.save(1, {k: v - 1 for k, v in state.items()}).result()
            with monkeypatch.context() as patch:
                for owner, name in OPERATIONS:
                    patch.setattr(owner, name, hooked(getattr(owner, name)))
                handle = store.save(2, state)
                error = handle._future.exception()
            if error is not None:
                failures += 1
                message = "Input/output error" if fault == errno.EIO else "disk full while"
                with pytest.raises(CheckpointError, match=message):
                    handle.result()
            steps = check(root)
            assert steps[0] == 1
            assert steps == [1, 2] or error is not None, n
            store.save(3, {k: v + 1 for k, v in state.items()}).result()
        assert check(root) == [*steps, 3]
        check_tidy(root)
        if left[0] >= 0:
            break
        n += 1
    assert failures > 8


def test_a_full_disk_is_called_so_as_tensorstore_says_it(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing local file "/x/c/2": Failed writing: "/x/c/2.__lock": '
            "Failed to write 4420 bytes to file 5: No space left on device [os_error_code='28']"
        )

    with CheckpointStore(tmp_path) as store:
        store.save(1, {"w": torch.ones(3)}).result()
        with monkeypatch.context() as patch:
            patch.setattr(writing, "write_array", full)
            handle = store.save(2, {"w": torch.zeros(3)})
            with pytest.raises(
                CheckpointError, match="step 2 was not saved: rank 0: disk full while"
            ):
                handle.result()
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
        store.save(3, {"w": torch.zeros(3)}).result()
        assert store.steps() == [1, 3]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_one_may_not_write_in_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with CheckpointStore(tmp_path / "run") as store:
        handle = store.save(1, {"w": torch.ones(3)})
        with pytest.raises(CheckpointError, match="check the permissions of the directory"):
            handle.result()
    tmp_path.chmod(0o700)
