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
from datetime import timedelta
from pathlib import Path

import torch
from mb_ckpt import CheckpointError, CheckpointStore
from mb_ckpt.format import packed
from mb_ckpt.saving import writing

MOMENTS = 200
LIMIT = timedelta(seconds=60)


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


def save_for_ever(root, rank):
    packed.LOCAL_SHARD_BYTES = 1 << 19
    kind = int(root.name.split("-")[1]) % 3
    how = [{}, {"staging": "lazy"}, {"layout": "zarr"}][kind]
    with CheckpointStore(root, keep_last=2, **how) as store:
        root.with_name(f"{root.name}.ready-{rank}").touch()
        last = None
        for step in range(1, 10_000):
            handle = store.save(step, state(step, 100_000))
            if last is not None:
                last.result()  # ends this process when another rank has gone
            last = handle


def save_for_ever_together(root, rank):
    import torch.distributed as dist

    meeting = root.with_name(f"{root.name}.meeting")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=LIMIT
    )
    save_for_ever(root, rank)


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


def fork(call, root, n=0):
    """Run ``call(root, n)`` in a fork; return its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call(Path(root), n)
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid):
    """Wait for a fork; return its exit code, or the negative of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(root, after, calls, victims):
    """Run *calls*, kill the *victims* among them *after* seconds of saving; the others must end."""
    pids = [fork(call, root, rank) for rank, call in enumerate(calls)]
    ready = [root.with_name(f"{root.name}.ready-{rank}") for rank in range(len(calls))]
    began = time.monotonic()
    while not all(path.exists() for path in ready):
        assert time.monotonic() - began < LIMIT.total_seconds()
        time.sleep(0.002)
    time.sleep(after)
    for rank in victims:
        os.kill(pids[rank], signal.SIGKILL)
    for rank, pid in enumerate(pids):
        assert ended(pid) == (-signal.SIGKILL if rank in victims else 1), rank


def kill_at(root, moment):
    """Kill a job at the random *moment*: one process, one of two ranks, or both."""
    after = random.Random(moment).uniform(0.02, 0.3)
    run = root / f"moment-{moment}"
    if moment % 5 < 3:
        kill(run, after, [save_for_ever], [0])
    else:
        kill(run, after, [save_for_ever_together] * 2, [1] if moment % 5 == 3 else [0, 1])


def kill_many(root, first):
    for moment in range(first, MOMENTS, 2):
        kill_at(root, moment)


def main():
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    codes = []
    while not codes or codes[-1] != 0:
        pid = fork(die_at_operation, root / f"operation-{len(codes)}", len(codes))
        codes.append(ended(pid))
        assert codes[-1] in (0, -signal.SIGKILL), codes
    assert [ended(pid) for pid in [fork(kill_many, root, first) for first in range(2)]] == [0, 0]
    assert ended(fork(file_too_large, root / "limited")) == 0
    print(len(codes))


if __name__ == "__main__":
    main()
