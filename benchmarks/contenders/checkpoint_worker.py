# SPDX-License-Identifier: Apache-2.0
"""One rank of one part of ``benchmarks/checkpoint.py``; and the function that starts all of them.

A rank is a new interpreter: some contenders start processes, which those of a pool may not.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Task = dict[str, Any]
Samples = dict[str, list[dict[str, float]]]


def run(task: Task, ranks: int, *, timeout_s: float = 1800.0) -> Any:
    """Carry out *task* on *ranks* new processes of this machine; return what rank 0 found.

    Raises:
        RuntimeError: If a rank failed; its output is in the message.
    """
    from mb_engine.testing import reserved_port

    folder = Path(task["root"])
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    processes = []
    holder = contextlib.ExitStack()
    port = holder.enter_context(reserved_port())
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        log = (folder / f"log_{rank}").open("w+")
        environment = {
            **os.environ,
            **{name: str(value) for name, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *_path()]),
        }
        command = [sys.executable, "-m", "contenders.checkpoint_worker", json.dumps(task)]
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        processes.append((child, log))
    try:
        codes = [child.wait(timeout_s) for child, _ in processes]
    finally:
        for child, _ in processes:
            child.kill()
            child.wait()
        holder.close()
    for code, (_, log) in zip(codes, processes, strict=True):
        log.seek(0)
        if code:
            raise RuntimeError(f"{task['what']} failed: {log.read()[-4000:]}")
        log.close()
    return json.loads(answer.read_text())


def _path() -> list[str]:
    return [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]


def main() -> None:
    """Do what one rank does."""
    warnings.simplefilter("ignore")  # of libraries; nothing here is about them
    logging.disable(logging.WARNING)
    import torch
    import torch.distributed as dist
    from mb_engine import testing_imports  # noqa: F401  # megatron-core on a CPU

    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks, mesh = dist.get_world_size(), None
    if ranks > 1:
        mesh = dist.init_device_mesh("cpu", (ranks,))
    found = {"save": save, "load": load, "loop": loop, "memory": memory}[task["what"]](task, mesh)
    if dist.get_rank() == 0:
        Path(task["root"], "answer.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def save(task: Task, mesh: Any) -> Samples:
    """Save with each contender in turn; the last step of each stays where it is."""
    from contenders.checkpointers import MEMCPY

    state, contenders = _contenders(task, mesh)
    orbax = _orbax(task)
    samples: Samples = {name: [] for name in (*contenders, *orbax)}
    _settle()
    for step, order in enumerate(_orders(samples, task["rounds"] + 1)):
        for name in order:
            _quiet()
            mine = name in contenders
            sample = _one_save(contenders[name], step) if mine else orbax[name].save(step)
            samples[name].append(sample)
            if not mine:
                forget(orbax[name].folder(step))  # or others would wait for what it has left
            if name != MEMCPY and step and _is_first():
                shutil.rmtree((orbax | contenders)[name].folder(step - 1))
    last = task["rounds"]
    folders = {
        name: str(c.folder(last)) for name, c in (orbax | contenders).items() if name != MEMCPY
    }
    for contender in (orbax | contenders).values():
        contender.close()
    del state
    found = {name: rows[1:] for name, rows in samples.items()}  # buffers are warm from then on
    if _is_first():
        Path(task["root"], "folders.json").write_text(json.dumps(folders))
    return found


def _one_save(contender: Any, step: int) -> dict[str, float]:
    began = time.perf_counter()
    begun = contender.save(step)
    blocking = time.perf_counter() - began
    begun.fence()
    begun.wait()
    return _slowest(blocking=blocking, durable=time.perf_counter() - began)


def load(task: Task, mesh: Any) -> Samples:
    """Load what `save` has left in ``task["saved"]``, each time from the disk."""
    import torch.distributed as dist

    from contenders.checkpoint_states import check_loaded, pieces_of
    from contenders.checkpointers import DISK, MAKERS, READERS, RESHARDING

    rank, ranks = dist.get_rank(), dist.get_world_size()
    saved = Path(task["saved"])
    folders = json.loads((saved / "folders.json").read_text())
    same = task["saved_ranks"] == ranks
    names = [name for name in (READERS if same else RESHARDING) if name in task["contenders"]]
    state = pieces_of(task["state"], rank, ranks, mesh)
    room = state.like()
    _ = room.tensors, room.megatron
    readers = {n: MAKERS[n](room, Path(task["root"], f"reader_{i}")) for i, n in enumerate(names)}
    orbax = _orbax(task) if same else {}
    samples: Samples = {name: [] for name in (*readers, *orbax)}
    _settle()
    for turn, order in enumerate(_orders(samples, task["rounds"] + 1)):
        for name in order:
            folder = Path(folders[name])
            if _is_first():
                forget(folder)
            _quiet()
            began = time.perf_counter()
            if name in orbax:
                seconds = orbax[name].load(folder)
            else:
                readers[name].load(room, folder)
                seconds = time.perf_counter() - began
                if not turn and name != DISK:  # which has no values
                    check_loaded(state, room, name)
            samples[name].append(_slowest(seconds=seconds))
            for tensor in room.local.values():
                tensor.fill_(-1)
    for reader in (*readers.values(), *orbax.values()):
        reader.close()
    return {name: rows[1:] for name, rows in samples.items()}  # the first one imports


def loop(task: Task, mesh: Any) -> Samples:
    """Save from a running training loop."""
    from contenders.checkpoint_training import Training, watch_save
    from contenders.checkpointers import MEMCPY

    _, contenders = _contenders(task, mesh)
    training, quiet = Training(), "no save"
    for _ in range(50):
        training.micro_batch()
    samples: Samples = {name: [] for name in (quiet, *contenders)}
    _settle()
    for step, order in enumerate(_orders(samples, task["rounds"] + 1)):
        for name in order:
            _quiet()
            if name == MEMCPY:
                samples[name].append({"blocking": _one_save(contenders[name], step)["blocking"]})
                continue
            begin = None if name == quiet else _begins(contenders[name], step)
            samples[name].append(watch_save(training, begin))
            if name != quiet and step:
                shutil.rmtree(contenders[name].folder(step - 1))
    for contender in contenders.values():
        contender.close()
    return {name: rows[1:] for name, rows in samples.items()}


def _begins(contender: Any, step: int) -> Callable[[], Any]:
    return lambda: contender.save(step)


def memory(task: Task, mesh: Any) -> dict[str, float]:
    """Return the bytes that saving with one contender needs beside the state, once it is warm."""
    from contenders.checkpoint_states import Pieces
    from contenders.checkpoint_training import MemoryPeak
    from contenders.checkpointers import MAKERS

    (name,) = task["contenders"]
    state, _ = _contenders({**task, "contenders": []}, mesh)
    first = dict(list(state.local.items())[-1:])
    little = Pieces(local=first, rank=state.rank, ranks=state.ranks, mesh=mesh)
    warm = MAKERS[name](little, Path(task["root"], "little"))
    begun = warm.save(0)  # imports, threads and processes are no part of the question
    begun.wait()
    warm.close()
    gc.collect()
    contender = MAKERS[name](state, Path(task["root"], "state"))
    with MemoryPeak() as peak:
        for step in range(task["rounds"]):
            _one_save(contender, step)
    contender.close()
    return {"growth": peak.growth, "state": state.nbytes}


def forget(folder: Path) -> None:
    """Write all files below *folder* to the disk and drop them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _contenders(task: Task, mesh: Any) -> tuple[Any, dict[str, Any]]:
    import torch.distributed as dist

    from contenders.checkpoint_states import pieces_of
    from contenders.checkpointers import MAKERS

    state = pieces_of(task["state"], dist.get_rank(), dist.get_world_size(), mesh)
    _ = state.tensors, state.megatron  # made before anything is timed
    root = Path(task["root"])
    return state, {
        name: MAKERS[name](state, root / f"contender_{i}")
        for i, name in enumerate(task["contenders"])
    }


def _orbax(task: Task) -> dict[str, Any]:
    import torch.distributed as dist

    from contenders.checkpoint_orbax import OrbaxProcess
    from contenders.checkpointers import ORBAX

    if not task.get("orbax") or dist.get_world_size() > 1:
        return {}
    return {ORBAX: OrbaxProcess(task["orbax"], task["state"], Path(task["root"], "orbax"))}


def _orders(names: Any, rounds: int) -> list[list[str]]:
    """Return the same orders on all ranks, another one each round."""
    shuffled = random.Random(0)
    return [shuffled.sample(list(names), len(names)) for _ in range(rounds)]


def _slowest(**seconds: float) -> dict[str, float]:
    """Return the largest of each over the ranks; waits for all of them."""
    import torch
    import torch.distributed as dist

    values = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(seconds, values.tolist(), strict=True))


def _settle() -> None:
    gc.collect()
    gc.freeze()  # what all these imports left would be walked in everybody's collections


def _quiet() -> None:
    """Begin without garbage, all ranks together."""
    import torch.distributed as dist

    gc.collect()
    dist.barrier()


def _is_first() -> bool:
    return os.environ["RANK"] == "0"


if __name__ == "__main__":
    main()
