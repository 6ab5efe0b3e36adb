# SPDX-License-Identifier: Apache-2.0
"""For tests: a tiny configuration, and functions run on several gloo ranks of this machine."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.process import BaseProcess

    from mb_config import ConfigContainer

_POLL_S = 0.02
# Imported once, in the process that ranks are forked from: what takes long to import.
_PRELOADED = [
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.fx.experimental.symbolic_shapes",
    "torch.utils.tensorboard",
    "pytest",
    "mb_engine.testing_imports",
]
_IS_RANK = "MB_ENGINE_TEST_RANK"


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def tiny_config(*overrides: str) -> ConfigContainer:
    """Return an unresolved configuration of a model small enough for any test.

    Four layers, hidden size 64, 4 query heads over 2 groups, gated MLP of 128, vocabulary 128,
    sequences of 32, mock data, float32.

    Args:
        overrides: Dotted assignments such as ``"model.num_layers=2"``.
    """
    from mb_config import ConfigContainer

    config = ConfigContainer.from_dict(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 128,
                "seq_length": 32,
                "vocab_size": 128,
            },
            "train": {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": 2},
            "dataset": {"type": "mock"},
            "dist": {"device": "cpu", "distributed_timeout_minutes": 1.0},
        }
    )
    return config.override(*overrides)


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout_s: float = 120.0,
    fresh: bool = False,
) -> list[Any]:
    """Run *function* on new processes that find each other as torchrun's would.

    The processes are forked from one that has imported torch and, without CUDA, megatron-core as
    the engine adapts it to the CPU, which saves each of them seconds. As with ``multiprocessing``,
    a script calls this under ``if __name__ == "__main__":``.

    Args:
        function: Defined at the top level of a module; it is called with *args* on every rank. The
            module need not be importable by name: a test file is loaded from where it is.
        ranks: How many processes, each with one thread.
        args: Picklable.
        timeout_s: Seconds until all processes are killed.
        fresh: Whether they start as new interpreters instead, with nothing imported.

    Returns:
        What *function* returned (picklable), by rank.

    Raises:
        RankError: If a rank raised, died or did not end in time; no process is left behind.
    """
    if _IS_RANK in os.environ:
        raise RankError(
            "a rank called run_ranks: put the call under `if __name__ == '__main__':`, because the"
            " file is loaded by every rank"
        )
    with tempfile.TemporaryDirectory(prefix="mb-ranks-") as name:
        folder = Path(name)
        call = (function.__module__, inspect.getfile(function), function.__qualname__, args)
        (folder / "call").write_bytes(pickle.dumps(call))
        processes: list[BaseProcess] = []
        with reserved_port() as port:
            try:
                places = [_place(folder, rank, ranks, port) for rank in range(ranks)]
                processes.extend(_start(place, fresh=fresh) for place in places)
                _wait(processes, folder, time.monotonic() + timeout_s)
            finally:
                for process in processes:
                    process.kill()
                    process.join()
        return [_load(folder / f"result_{rank}") for rank in range(ranks)]


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Give a TCP port on which one process may listen, and which no other is given meanwhile.

    The first rank listens only seconds after the port was chosen. A socket that is bound to it and
    does not listen keeps the system from giving it away, and as both allow reuse, not the rank.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def _place(folder: Path, rank: int, ranks: int, port: int) -> _Place:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        _IS_RANK: "1",
    }
    return _Place(
        folder=folder,
        rank=rank,
        environment=environment,
        path=list(sys.path),
        directory=Path.cwd(),
        outputs={fd: _Inherited(fd) for fd in (1, 2)},
    )


def _start(place: _Place, *, fresh: bool) -> BaseProcess:
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    with _one_thread():
        if not fresh:
            context.set_forkserver_preload(_PRELOADED)
            forkserver.ensure_running()
        process: BaseProcess = context.Process(target=_run_rank, args=(place,), daemon=True)
        process.start()
    return process


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have processes started now take one thread each; OpenMP reads that when it is loaded."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


class _Inherited:
    """An open file of this process; arrives in the child as the number of its own copy."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (reduction.DupFd(self._fd),)


def _detach(copy: Any) -> int:
    number: int = copy.detach()
    return number


def _wait(processes: list[BaseProcess], folder: Path, deadline: float) -> None:
    running = list(range(len(processes)))
    while running:
        codes = {rank: processes[rank].exitcode for rank in running}
        failed = [rank for rank, code in codes.items() if code]
        if failed:
            # The first to raise is the cause; others may only have lost their peer.
            raised = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
            if raised:
                raise RankError(raised[0].read_text())
            raise RankError(f"rank {failed[0]} ended with exit code {codes[failed[0]]}")
        running = [rank for rank, code in codes.items() if code is None]
        if running and time.monotonic() > deadline:
            raise RankError(f"ranks {running} did not end in time")
        time.sleep(_POLL_S)


@define(kw_only=True)
class _Place:
    """Where a rank works, and as what."""

    folder: Path
    rank: int
    environment: dict[str, str]
    path: list[str]
    directory: Path
    outputs: dict[int, Any]

    def take(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        sys.path[:] = self.path
        for fd, copy in self.outputs.items():
            if copy != fd:  # a new interpreter has inherited the file under its own number
                os.dup2(copy, fd)
                os.close(copy)


def _run_rank(place: _Place) -> None:
    """Do what one process of :func:`run_ranks` does."""
    place.take()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        call = (place.folder / "call").read_bytes()
        module, file, qualname, args = pickle.loads(call)  # noqa: S301
        result = _function(module, file, qualname)(*args)
        _save(result, place.folder / f"result_{place.rank}")
    except BaseException:  # noqa: BLE001 - the parent raises it
        text = f"rank {place.rank}:\n{traceback.format_exc()}"
        _write(place.folder / f"error_{place.rank}", text.encode())
        raise SystemExit(1) from None


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _function(module_name: str, file: str, qualname: str) -> Callable[..., Any]:
    spec = None
    if module_name != "__main__":
        try:
            spec = importlib.util.find_spec(module_name)
        except ImportError:
            spec = None
    if spec is not None and spec.origin == file:
        module = importlib.import_module(module_name)
    else:
        name = Path(file).stem
        sys.path.append(str(Path(file).parent))
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is no Python module")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    function: Any = module
    for part in qualname.split("."):
        function = getattr(function, part)
    found: Callable[..., Any] = function
    return found


def _save(result: Any, path: Path) -> None:
    # Megatron-core 0.19 makes pickled tensors ask for itself when they are loaded; torch's own
    # format does not. A rank without torch has no tensors.
    torch = sys.modules.get("torch")
    if torch is None:
        path.with_suffix(".pickle").write_bytes(pickle.dumps(result))
    else:
        torch.save(result, path.with_suffix(".pt"))


def _load(path: Path) -> Any:
    if path.with_suffix(".pickle").exists():
        return pickle.loads(path.with_suffix(".pickle").read_bytes())  # noqa: S301
    import torch

    return torch.load(path.with_suffix(".pt"), weights_only=False)


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"part_{path.name}")
    part.write_bytes(content)
    part.rename(path)
