# SPDX-License-Identifier: Apache-2.0
"""Folders of ``torch.distributed.checkpoint`` (DCP), written by DCP itself a few tensors at a time."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from mb_ckpt.errors import CheckpointError
from mb_ckpt.states.plain_tree import Pickled
from mb_ckpt.states.storable import TensorToRead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from mb_ckpt.interop.foreign import Outgoing

_FILE_BYTES = 32 << 20


def write_dcp(folder: Path, outgoing: Outgoing, *, progress: Callable[[int, int], None]) -> None:
    """Write *outgoing* so that ``dcp.load`` and ``dcp_to_torch_save`` read it, durable on return.

    Args:
        folder: There and empty.
        outgoing: Tensors that were shards go under their keys, others where they were.
        progress: Called with the bytes written so far, and all that will be.

    Raises:
        CheckpointError: If two entries have one key, or plain data hold pickles.
        OSError: If the storage refuses.
    """
    state = dict(outgoing.state)
    placed = {id(leaf) for _, leaf in leaves(state) if isinstance(leaf, TensorToRead)}
    loose = {key: t for key, t in outgoing.tensors.items() if id(t) not in placed}
    for key in loose.keys() & state.keys():
        raise CheckpointError(f"tensor {key!r} has the name of other data: rename it")
    save_through_dcp(folder, {**state, **loose}, progress, nested=True)


def save_through_dcp(
    folder: Path, state: Mapping[str, Any], progress: Callable[[int, int], None], *, nested: bool
) -> None:
    """Have DCP save *state*, in which tensors are `TensorToRead`, in the memory of a few of them.

    Args:
        folder: There and empty.
        state: What to save.
        progress: Called with the bytes written so far, and all that will be.
        nested: Whether DCP is to give every leaf an entry; else each item of *state* has one.

    Raises:
        CheckpointError: If plain data hold pickles, or a tensor cannot be read.
        OSError: If the storage refuses.
    """
    refuse_pickles(state)
    planner = _Planner(progress, nested=nested)
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process is meant
            save(planner.on_meta(dict(state)), storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as e:  # not an Exception
        error, _ = next(iter(e.failures.values()))
        if isinstance(error, (OSError, CheckpointError)):
            raise error from None
        raise CheckpointError(f"DCP could not write {folder}: {error}") from error


def refuse_pickles(state: Any) -> None:
    """Refuse plain data with pickles in them, which are not written elsewhere unseen."""
    held = [path for path, leaf in leaves(state) if isinstance(leaf, Pickled)]
    if held:
        raise CheckpointError(
            f"{', '.join(held)} is stored as a pickle, which is not handed on: leave it out with "
            "prefix="
        )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of every leaf of a nested state."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from leaves(item, f"{path}.{key}" if path else str(key))


class _Planner(DefaultSavePlanner):
    """Plans with tensors on ``meta``, and reads one when it is written."""

    def __init__(self, progress: Callable[[int, int], None], *, nested: bool) -> None:
        super().__init__(flatten_state_dict=nested)
        self._progress = progress
        self._sources: dict[int, TensorToRead] = {}
        self._done = self._total = 0

    def on_meta(self, value: Any) -> Any:
        """Return a nested state with tensors on ``meta`` in place of those to be read."""
        if isinstance(value, TensorToRead):
            stand_in = torch.empty(value.shape, dtype=value.dtype, device="meta")
            self._sources[id(stand_in)] = value
            self._total += value.nbytes
            return stand_in
        if isinstance(value, dict):
            return {key: self.on_meta(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.on_meta(item) for item in value])
        return value

    def transform_object(self, write_item: Any, object: Any) -> Any:  # noqa: A002  # DCP's name
        """Return what is to be written: a tensor, or the bytes of something else."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().transform_object(write_item, object)
        source = self._sources[id(object)]
        values = torch.empty(source.shape)
        if source.nbytes:
            values = source.read_rows(0, source.shape[0] if source.shape else 1)
        self._done += source.nbytes
        self._progress(self._done, self._total)
        return values.to(source.dtype).reshape(source.shape)


class _Writer(FileSystemWriter):
    """Begins a new file before one holds too much: DCP keeps the tensors of the file it writes."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write all of *plan*."""
        results: list[Any] = []
        for i, items in enumerate(_files(plan.items)):
            # Named as those of as many ranks would be.
            part = replace(plan, items=items, storage_data=_StoragePrefix(f"__{i}_"))
            results += super().write_data(part, planner).wait()
        done: Future[Any] = Future()
        done.set_result(results)
        return done


def _files(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield what goes into one file each."""
    together: list[Any] = []
    nbytes = 0
    for item in items:
        data = item.tensor_data
        size = 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
        if together and nbytes + size > _FILE_BYTES:
            yield together
            together, nbytes = [], 0
        together.append(item)
        nbytes += size
    if together:
        yield together
