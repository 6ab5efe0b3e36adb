# SPDX-License-Identifier: Apache-2.0
"""``torch.distributed.checkpoint`` (DCP) with our files: its planners, and what a store promises."""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from mb_config.records import TensorShard
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from mb_ckpt.errors import CheckpointError
from mb_ckpt.inspection import describe
from mb_ckpt.loading import tiers
from mb_ckpt.loading.matching import LoadOptions
from mb_ckpt.places import catalogue
from mb_ckpt.places.stores import open_store
from mb_ckpt.states.pieces import dtype_name
from mb_ckpt.store import CheckpointStore

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.checkpoint.planner import (
        LoadPlan,
        LoadPlanner,
        ReadItem,
        SavePlan,
        SavePlanner,
        WriteItem,
    )

_BYTES = "dcp.bytes/"
"""Before the keys of what the planner has made bytes of."""
_TREE = "dcp"
_MAPPINGS = "planner_data"
_STEP = re.compile(r"(\d+)/*$")
_STORES: dict[Any, CheckpointStore] = {}


class TensorStoreWriter(StorageWriter):
    """Saves what ``torch.distributed.checkpoint`` plans as a step of a `CheckpointStore`.

    A step is committed as a whole when all ranks have written, and ``CheckpointStore.load`` reads it
    under the same keys. Works with ``dcp.save`` and ``dcp.async_save``; the calls of one job make
    one store, whichever writers they are given. Every rank makes its own writer, on the thread that
    makes process groups.

    Args:
        url_or_path: A place that all ranks share, as of `CheckpointStore`.
        step: Number of the step. None takes the digits at the end of ``checkpoint_id`` (``100`` of
            ``iter_0000100``), or without one the number after the newest step's.
        process_group: The one that ``dcp.save`` is given.
        options: Further arguments of `CheckpointStore`, such as ``keep_last`` and ``layout``.

    Raises:
        CheckpointError: If the location is not supported.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        url_or_path: str | os.PathLike[str],
        *,
        step: int | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.step = step
        self._store = _store(os.fspath(url_or_path), process_group, options)
        self._wanted = step
        self._mappings: dict[str, Any] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save."""
        self._wanted = _step_of(checkpoint_id) if checkpoint_id is not None else self.step
        self._mappings = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the store has been made."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return *plan*: a store has no wishes."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return *plans* with the number of the step, the same for all."""
        for plan in plans:
            self._mappings |= plan.planner_data or {}
        step = self._wanted
        if step is None:
            step = max(catalogue.committed(open_store(self._store.url)), default=0) + 1
        return [replace(plan, storage_data=step) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Save together with the other ranks; the step is committed when it returns.

        Raises:
            CheckpointError: On every rank, if any could not give its data or write.
        """
        results: list[WriteResult] = []
        state: dict[str, Any] = {}
        try:
            shards = []
            for item in plan.items:
                shard = _shard(item, planner)
                shards.append(shard)
                size = shard.data.numel() * shard.data.element_size()
                result = WriteResult(index=item.index, size_in_bytes=size, storage_data=None)
                results.append(result)
            state = {"tensors": shards, _TREE: {_MAPPINGS: self._mappings}}
        except Exception as error:  # noqa: BLE001 - the other ranks wait to hear of it
            state = {_TREE: _Raises(error)}
        try:
            self._store.save(plan.storage_data, state).result()
        finally:
            self._store.let_others_save()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the step has been committed."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether *checkpoint_id* ends with the number of a step."""
        return _STEP.search(os.fspath(checkpoint_id)) is not None


class TensorStoreReader(StorageReader):
    """Loads a step into what ``torch.distributed.checkpoint`` plans, in any sharding.

    Values are converted where dtypes differ, as DCP does. Steps that ``CheckpointStore.save`` wrote
    are read as well, tensors alone.

    Args:
        url_or_path: Where the steps are.
        step: Which one; None for the one that ``checkpoint_id`` ends with, else the newest. Name it
            where another job may be saving: each rank looks for itself.

    Raises:
        CheckpointError: If the location is not supported.
    """

    def __init__(self, url_or_path: str | os.PathLike[str], *, step: int | None = None) -> None:
        super().__init__()
        self.step = step
        self._wanted = step
        self._places = [open_store(url_or_path)]

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load."""
        self._wanted = _step_of(checkpoint_id) if checkpoint_id is not None else self.step

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what the step holds; every tensor is one chunk, of which any part can be read.

        Raises:
            CheckpointError: If there is no such step.
        """
        manifest = self._found()[0][1]
        self._wanted = manifest.step
        entries: dict[str, Any] = {}
        for key in manifest.tensors:
            dtype, shape = manifest.tensors.kind(key)
            if key.startswith(_BYTES):
                entries[key.removeprefix(_BYTES)] = BytesStorageMetadata()
                continue
            size = torch.Size(shape)
            entries[key] = TensorStorageMetadata(
                properties=TensorProperties(dtype=getattr(torch, dtype)),
                size=size,
                chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)],
            )
        plain = describe(self._places[0], manifest).plain
        tree = plain.get(_TREE) if isinstance(plain, dict) else None
        known = tree.get(_MAPPINGS, {}) if isinstance(tree, dict) else {}
        mappings = {key: known.get(key, (key,)) for key in entries}
        return Metadata(state_dict_metadata=entries, planner_data=mappings)

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Do nothing: places are open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return *plan*."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return *plans*."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what *plan* asks for, straight into its tensors.

        Raises:
            CorruptCheckpointError: If stored bytes are damaged; names tensor and file.
        """
        found = self._found()
        sizes = found[0][1].tensors
        shards: list[TensorShard] = []
        rooms: list[tuple[ReadItem, Tensor]] = []
        for item in plan.items:
            key = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                shape = sizes[_BYTES + key].shape
                room = torch.empty(shape, dtype=torch.uint8)
                shards.append(TensorShard.whole(_BYTES + key, room))
            else:
                room = planner.resolve_tensor(item).detach()
                shards.append(
                    TensorShard(
                        key=key,
                        data=room,
                        global_shape=sizes[key].shape,
                        offset=tuple(item.storage_offsets),
                        local_shape=tuple(item.lengths),
                        dtype=dtype_name(room.dtype),
                    )
                )
            rooms.append((item, room))
        tiers.load(self._places, found, {"wanted": shards}, LoadOptions(cast=True))
        for item, room in rooms:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(room.numpy().tobytes()))
            else:
                planner.commit_tensor(item, room)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether *checkpoint_id* ends with the number of a step."""
        return _STEP.search(os.fspath(checkpoint_id)) is not None

    def _found(self) -> tiers.Found:
        if self._wanted is None:
            return tiers.newest(self._places)
        return tiers.of_step(self._places, self._wanted)


class _Raises:
    """In the state of a rank that cannot save: tells all others why."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def state_dict(self) -> Any:
        raise CheckpointError(f"the planner gave no data: {self._error}") from self._error

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError(state)


def _store(url: str, process_group: Any, options: dict[str, Any]) -> CheckpointStore:
    """Return the store of this job for *url*; one is made where there is none.

    DCP's users make a writer a save, and a store has groups of its own.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.group.WORLD if distributed else None
    key = (url, id(process_group), id(world), repr(sorted(options.items())))
    if key not in _STORES:
        _STORES[key] = CheckpointStore(url, process_group=process_group, **options)
    return _STORES[key]


def _step_of(checkpoint_id: str | os.PathLike[str]) -> int:
    match = _STEP.search(os.fspath(checkpoint_id))
    if match is None:
        raise CheckpointError(
            f"checkpoint_id={os.fspath(checkpoint_id)!r}: expected the number of a step, or a name"
            " that ends with it, such as iter_0000100; leave it out for the next number"
        )
    return int(match[1])


def _shard(item: WriteItem, planner: SavePlanner) -> TensorShard:
    data = planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        assert isinstance(data, io.BytesIO)
        values = torch.frombuffer(bytearray(data.getbuffer()), dtype=torch.uint8)
        return TensorShard.whole(_BYTES + item.index.fqn, values)
    assert isinstance(data, torch.Tensor)
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return TensorShard(
        key=item.index.fqn,
        data=data.detach(),
        global_shape=tuple(item.tensor_data.size),
        offset=tuple(chunk.offsets),
        local_shape=tuple(chunk.sizes),
        dtype=dtype_name(data.dtype),
    )
