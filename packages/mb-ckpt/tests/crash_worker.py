# SPDX-License-Identifier: Apache-2.0
"""Run by test_crash.py in a process of its own: forks writers and lets them die while they save.

One import of torch serves all of them. Nothing of tensorstore runs before the fork.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from mb_ckpt import CheckpointError, CheckpointStore
from mb_ckpt.format import packed
from mb_ckpt.saving import writing


def state(step, size=20_000):
    return {f"t{i}": torch.full((size,), step + i / 8) for i in range(6)}


def on_each_operation(act):
    """Call *act* before every file operation of a save."""

    def hooked(call):
        def run(*args, **kwargs):
            act()
            return call(*args, **kwargs)

        return run

    for name in ("fsync", "open", "pwritev"):
        setattr(os, name, hooked(getattr(os, name)))
    shutil.rmtree = hooked(shutil.rmtree)
    writing.write_array = hooked(writing.write_array)
    for name in ("replace", "unlink", "mkdir", "open"):
        setattr(Path, name, hooked(getattr(Path, name)))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_operation(root, n):
    with CheckpointStore(root, keep_last=1) as store:
        store.save(1, state(1)).result()
        left = [n]

        def act():
            left[0] -= 1
            if left[0] < 0:
                die()

        on_each_operation(act)
        store.save(2, state(2)).result()


def save_for_ever(root, _):
    packed.LOCAL_SHARD_BYTES = 1 << 20
    kind = int(root.name.split("-")[1]) % 3
    how = [{}, {"staging": "lazy"}, {"layout": "zarr"}][kind]
    with CheckpointStore(root, keep_last=2, **how) as store:
        for step in range(1, 10_000):
            store.save(step, state(step, 300_000))


def file_too_large(root, _):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with CheckpointStore(root) as store:
        store.save(1, state(1)).result()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        try:
            store.save(2, state(2)).result()
        except CheckpointError as e:
            (root / "said").write_text(str(e))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        store.save(3, state(3)).result()


def forked(call, root, n=0, kill_after=None):
    """Run ``call(root, n)`` in a fork; return its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call(Path(root), n)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    codes = []
    while not codes or codes[-1] != 0:
        codes.append(forked(die_at_operation, root / f"operation-{len(codes)}", len(codes)))
        assert codes[-1] in (0, -signal.SIGKILL), codes
    chosen = random.Random(5)
    for i in range(int(os.environ.get("MB_CKPT_CRASHES", "25"))):
        code = forked(save_for_ever, root / f"moment-{i}", kill_after=chosen.uniform(0.1, 0.5))
        assert code == -signal.SIGKILL, code
    assert forked(file_too_large, root / "limited") == 0
    print(len(codes))


if __name__ == "__main__":
    main()
