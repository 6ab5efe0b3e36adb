# SPDX-License-Identifier: Apache-2.0
"""mb-ckpt and what it is compared with, each behind the same four verbs."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import define, field, frozen

from contenders.checkpoint_states import Pieces

_BLOCK, _FILE, _DISK_THREADS = 8 << 20, 64 << 20, 4


def nothing() -> None:
    """What one waits for where there is nothing to wait for."""


@frozen
class Begun:
    """A save after it has let the loop go on.

    Attributes:
        fence: Returns when the tensors may change.
        wait: Returns when the step is durable.
        poll: Called between steps by a training loop, where the contender asks for it.
        done: Whether `wait` would return at once.
    """

    fence: Callable[[], None] = nothing
    wait: Callable[[], None] = nothing
    poll: Callable[[], None] = nothing
    done: Callable[[], bool] = lambda: True


class Checkpointer(Protocol):
    """One contender on one rank, made with its state and a folder of its own."""

    def save(self, step: int) -> Begun:
        """Save; what takes place before it returns is what blocks the loop."""
        ...

    def folder(self, step: int) -> Path:
        """Return where *step* is."""
        ...

    def load(self, room: Pieces, folder: Path) -> None:
        """Fill *room* from the step in *folder*."""
        ...

    def close(self) -> None:
        """End threads and processes."""
        ...


@define(eq=False)
class _InFolders:
    """Those that write each step into a folder of the loop's choice."""

    state: Pieces
    root: Path

    def folder(self, step: int) -> Path:
        return self.root / f"{step:04d}"

    def new_folder(self, step: int) -> Path:
        folder = self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def close(self) -> None:
        """Nothing goes on after a save."""


def _sync(path: Path) -> None:
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _take(room: Pieces, loaded: dict[str, torch.Tensor]) -> None:
    """Copy into the tensors that are there, as ``load_state_dict`` does."""
    with torch.no_grad():
        for name, tensor in room.local.items():
            tensor.copy_(loaded[name])


class TorchSave(_InFolders):
    """``torch.save`` of what the rank holds into a file of its own, then fsync."""

    def save(self, step: int) -> Begun:
        path = self.new_folder(step) / f"rank_{self.state.rank}.pt"
        with path.open("wb") as file:
            torch.save(self.state.local, file)
            file.flush()
            os.fsync(file.fileno())
        _sync(path)
        return Begun()

    def load(self, room: Pieces, folder: Path) -> None:
        _take(room, torch.load(folder / f"rank_{room.rank}.pt", weights_only=True))


class SafeTensors(_InFolders):
    """``safetensors.torch.save_file`` of what the rank holds into a file of its own, then fsync."""

    def save(self, step: int) -> Begun:
        from safetensors.torch import save_file

        path = self.new_folder(step) / f"rank_{self.state.rank}.safetensors"
        save_file(self.state.local, path)
        _sync(path)
        return Begun()

    def load(self, room: Pieces, folder: Path) -> None:
        from safetensors.torch import load_file

        _take(room, load_file(folder / f"rank_{room.rank}.safetensors"))


class Dcp(_InFolders):
    """``torch.distributed.checkpoint.save`` as it comes: one thread, fsync."""

    def save(self, step: int) -> Begun:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(self.folder(step))
        dcp.save(dict(self.state.tensors), storage_writer=writer)
        return Begun()

    def load(self, room: Pieces, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(dict(room.tensors), storage_reader=dcp.FileSystemReader(folder))


class DcpAsync(Dcp):
    """``async_save`` as it comes: a fresh copy of the state, written by a thread."""

    def save(self, step: int) -> Begun:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(self.folder(step))
        future: Any = dcp.async_save(dict(self.state.tensors), storage_writer=writer)
        return Begun(wait=future.result, done=future.done)


@define(eq=False)
class DcpKept(Dcp):
    """``async_save`` with its staging copy and its plans kept between saves.

    Args:
        state: What to save.
        root: Where to.
        process: Whether a process writes, out of shared memory, or a thread.
    """

    process: bool
    _stager: Any = field(default=None, init=False)

    def save(self, step: int) -> Begun:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        if self._stager is None:
            # Pinned memory, a staging thread and non-blocking copies need CUDA.
            self._stager = DefaultStager(StagingOptions(False, self.process, False, False))
        kind = AsyncCheckpointerType.PROCESS if self.process else AsyncCheckpointerType.THREAD
        response: Any = dcp.async_save(
            dict(self.state.tensors),
            checkpoint_id=self.folder(step),
            planner=dcp.DefaultSavePlanner(enable_plan_caching=True),
            async_checkpointer_type=kind,
            async_stager=self._stager,
        )
        future = getattr(response, "upload_completion", response)
        return Begun(wait=future.result, done=future.done)

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class MegatronDist(_InFolders):
    """megatron-core's ``torch_dist`` format, saved in the foreground."""

    def save(self, step: int) -> Begun:
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(dict(self.state.megatron), str(self.new_folder(step)))
        return Begun()

    def load(self, room: Pieces, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        _take(room, dist_checkpointing.load(dict(room.megatron), str(folder)))


@define(eq=False)
class MegatronAsync(MegatronDist):
    """``torch_dist`` written by a forked process, its structure kept between saves."""

    _queue: Any = field(default=None, init=False)
    _strategy: Any = field(default=None, init=False)

    def save(self, step: int) -> Begun:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        if self._queue is None:
            self._queue = AsyncCallsQueue()
            self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
        request = dist_checkpointing.save(
            dict(self.state.megatron),
            str(self.new_folder(step)),
            self._strategy,
            async_sharded_save=True,
        )
        queue = self._queue
        queue.schedule_async_request(request)
        return Begun(
            wait=lambda: queue.maybe_finalize_async_calls(blocking=True),
            poll=lambda: queue.maybe_finalize_async_calls(blocking=False),
            done=lambda: queue.get_num_unfinalized_calls() == 0,
        )

    def close(self) -> None:
        if self._queue is not None:
            self._queue.close()


@define(eq=False)
class Ours:
    """`mb_ckpt.CheckpointStore`.

    Args:
        state: What to save.
        root: Where to.
        settings: Of the store.
    """

    state: Pieces
    root: Path
    settings: dict[str, Any] = field(factory=dict)
    _store: Any = field(default=None, init=False)
    _paths: dict[int, Path] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        from mb_ckpt import CheckpointStore

        self._store = CheckpointStore(self.root, **self.settings)

    def folder(self, step: int) -> Path:
        return self._paths[step]

    def save(self, step: int) -> Begun:
        handle = self._store.save(step, dict(self.state.tensors))
        self._paths[step] = Path(handle.path.removeprefix("file://"))
        return Begun(fence=handle.wait_staged, wait=handle.result, done=handle.done)

    def load(self, room: Pieces, folder: Path) -> None:
        from mb_ckpt import CheckpointStore

        with CheckpointStore(folder.parent) as store:
            store.load(dict(room.tensors))

    def close(self) -> None:
        self._store.close()


@define(eq=False)
class Memcpy:
    """One copy of as many bytes into warm memory: the measure of blocking times; saves nothing."""

    state: Pieces
    root: Path
    _memory: Any = field(default=None, init=False)

    def folder(self, step: int) -> Path:
        raise TypeError(f"step {step} of {self.root} is nowhere: a copy saves nothing")

    def save(self, step: int) -> Begun:  # noqa: ARG002
        if self._memory is None:
            self._memory = [torch.ones(self.state.nbytes, dtype=torch.uint8) for _ in range(2)]
        target, source = self._memory
        target.copy_(source)
        return Begun()

    def load(self, room: Pieces, folder: Path) -> None:
        raise TypeError(
            f"nothing of {len(room.local)} tensors is in {folder}: a copy saves nothing"
        )

    def close(self) -> None:
        self._memory = None


@define(eq=False)
class Disk(_InFolders):
    """As many bytes as the state has, as fast as this disk takes and gives them: no format at all.

    Written past the page cache out of warm memory in files of 64 MiB, each synced; read into warm
    memory in pieces of 8 MiB; both by four threads.
    """

    _memory: Any = field(default=None, init=False)

    def _warm(self, nbytes: int) -> Any:
        if self._memory is None or len(self._memory) < nbytes:
            self._memory = memoryview(mmap.mmap(-1, nbytes))
            self._memory[:] = bytes(range(256)) * (nbytes // 256)
        return self._memory

    def save(self, step: int) -> Begun:
        folder, total = self.new_folder(step), -(-self.state.nbytes // _BLOCK) * _BLOCK
        memory = self._warm(total)

        def write(start: int) -> None:
            path, flags = folder / f"{self.state.rank}_{start:012d}", os.O_WRONLY | os.O_CREAT
            file = os.open(path, flags | os.O_DIRECT)
            try:
                for at in range(start, min(start + _FILE, total), _BLOCK):
                    os.pwrite(file, memory[at : at + _BLOCK], at - start)
                os.fsync(file)
            finally:
                os.close(file)

        with ThreadPoolExecutor(_DISK_THREADS) as threads:
            list(threads.map(write, range(0, total, _FILE)))
        _sync(folder)
        return Begun()

    def load(self, room: Pieces, folder: Path) -> None:
        """Read this rank's part of all blocks; fills nothing."""
        files = sorted(folder.iterdir())
        blocks = [(path, at) for path in files for at in range(0, path.stat().st_size, _BLOCK)]
        mine = blocks[room.rank :: room.ranks]
        memory = self._warm(len(mine) * _BLOCK)

        def read(i: int) -> None:
            path, at = mine[i]
            file = os.open(path, os.O_RDONLY)
            try:
                os.preadv(file, [memory[i * _BLOCK : (i + 1) * _BLOCK]], at)
            finally:
                os.close(file)

        with ThreadPoolExecutor(_DISK_THREADS) as threads:
            list(threads.map(read, range(len(mine))))


def ours(**settings: Any) -> Callable[[Pieces, Path], Checkpointer]:
    """Return a maker of `Ours` with *settings*."""
    return lambda state, root: Ours(state, root, settings)


def kept(*, process: bool) -> Callable[[Pieces, Path], Checkpointer]:
    """Return a maker of `DcpKept`."""
    return lambda state, root: DcpKept(state, root, process)


MEMCPY, OURS, OURS_LAZY, OURS_PROCESS = "memcpy", "mb-ckpt", "mb-ckpt, lazy", "mb-ckpt, process"
OURS_BOTH = "mb-ckpt, lazy, process"
DCP, DCP_ASYNC = "DCP", "DCP async, thread (its default)"
DCP_THREAD, DCP_PROCESS = "DCP async, thread, kept copy", "DCP async, process, kept shared copy"
MEGATRON, MEGATRON_ASYNC = "megatron torch_dist", "megatron torch_dist async"
TORCH, SAFETENSORS, ORBAX = "torch.save", "safetensors", "orbax"
DISK = "the disk alone"

MAKERS: dict[str, Callable[[Pieces, Path], Checkpointer]] = {
    MEMCPY: Memcpy,
    DISK: Disk,
    TORCH: TorchSave,
    SAFETENSORS: SafeTensors,
    DCP: Dcp,
    DCP_ASYNC: DcpAsync,
    DCP_THREAD: kept(process=False),
    DCP_PROCESS: kept(process=True),
    MEGATRON: MegatronDist,
    MEGATRON_ASYNC: MegatronAsync,
    OURS: ours(),
    OURS_LAZY: ours(staging="lazy"),
    OURS_PROCESS: ours(writer="process"),
    OURS_BOTH: ours(staging="lazy", writer="process"),
}
RESHARDING = (DISK, DCP, MEGATRON, OURS)
"""Those that load what another number of ranks has saved."""
READERS = (TORCH, SAFETENSORS, *RESHARDING)
SAVERS = (MEMCPY, DISK, TORCH, SAFETENSORS, DCP, DCP_ASYNC, MEGATRON, MEGATRON_ASYNC, OURS)
SAVERS_OF_TWO = (MEMCPY, DISK, TORCH, SAFETENSORS, DCP, DCP_ASYNC, MEGATRON, OURS)
"""With two ranks, because some take many seconds."""
BEHIND = (
    DCP_ASYNC, DCP_THREAD, DCP_PROCESS, MEGATRON_ASYNC, OURS, OURS_LAZY, OURS_PROCESS, OURS_BOTH,
)  # fmt: skip
"""Those that write while training goes on."""
