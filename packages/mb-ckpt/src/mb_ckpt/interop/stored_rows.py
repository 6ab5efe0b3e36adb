# SPDX-License-Identifier: Apache-2.0
"""Tensors of a stored step, of which rows are read and checked when they are asked for."""

from __future__ import annotations

import mmap
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from mb_config.records import TensorShard
from torch import Tensor

from mb_ckpt.loading.packed_reader import fill
from mb_ckpt.loading.segments import bits
from mb_ckpt.loading.zarr_reader import fill_arrays
from mb_ckpt.states.pieces import Piece, of_shard
from mb_ckpt.states.storable import TensorToRead

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mb_ckpt.format.manifest import Manifest
    from mb_ckpt.interfaces import Store

_SMALL = 1 << 20
"""Tensors up to so many bytes are read together with those after them."""
_AHEAD = 16 << 20
"""Most bytes of small tensors held."""
_BEYOND = 64 << 20
"""Most bytes of a row of chunks for which what was read too much is held."""


class StoredRows:
    """Reads rows of the tensors of one step.

    Small tensors that are asked for in order are read many at a time, once, and rows of large ones
    with the others of their chunks.

    Args:
        store: Where the step is.
        manifest: Of the step.
        keys: In the order in which they will be asked for.
    """

    def __init__(self, store: Store, manifest: Manifest, keys: Iterable[str]) -> None:
        self._store = store
        self._manifest = manifest
        self._small = [
            key for key in keys if self._nbytes(key) <= _SMALL or not manifest.tensors.kind(key)[1]
        ]
        self._places = {key: i for i, key in enumerate(self._small)}
        self._held: dict[str, Tensor] = {}
        self._zarr = manifest.layout == "zarr"
        self._beyond: dict[tuple[str, int], Tensor] = {}

    def tensor(self, key: str) -> TensorToRead:
        """Return the tensor *key*; reading it raises `CorruptCheckpointError` on damage."""
        dtype, shape = self._manifest.tensors.kind(key)
        rows = partial(self._read, key)
        return TensorToRead(dtype=getattr(torch, dtype), shape=tuple(shape), read_rows=rows)

    def _read(self, key: str, start: int, stop: int) -> Tensor:
        if key in self._places:
            if key not in self._held:
                self._held = {}  # first: never twice as much
                self._held = self._read_ahead(self._places[key])
            found = self._held[key]
            return found[start:stop] if found.dim() else found
        kept = self._beyond.pop((key, start), None)
        self._beyond = {}
        if kept is None or len(kept) < stop - start:
            kept = self._read_on(key, start, self._chunk_end(key, stop), kept)
        if len(kept) > stop - start:
            self._beyond = {(key, stop): kept[stop - start :]}
        return kept[: stop - start]

    def _read_on(self, key: str, start: int, stop: int, kept: Tensor | None) -> Tensor:
        """Return rows, the first of which are *kept*."""
        dtype, shape = self._manifest.tensors.kind(key)
        rows = _room((stop - start, *shape[1:]), getattr(torch, dtype))
        count = 0
        if kept is not None:
            count = len(kept)
            bits(rows[:count]).copy_(bits(kept))
        offset = (start + count, *(0 for _ in shape[1:]))
        self._fill([_shard(key, rows[count:], tuple(shape), offset)])
        return rows

    def _chunk_end(self, key: str, stop: int) -> int:
        """Return the row up to which to read so that no chunk of layout zarr is read twice."""
        chunks = self._manifest.tensors[key].chunk_shape if self._zarr else None
        if not chunks:
            return stop
        _, shape = self._manifest.tensors.kind(key)
        if chunks[0] * (self._nbytes(key) // shape[0]) > _BEYOND:
            return stop
        return min(-(-stop // chunks[0]) * chunks[0], shape[0])

    def _read_ahead(self, first: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        shards = []
        nbytes = 0
        for key in self._small[first:]:
            nbytes += self._nbytes(key)
            if found and nbytes > _AHEAD:
                break
            dtype, shape = self._manifest.tensors.kind(key)
            found[key] = torch.empty(shape, dtype=getattr(torch, dtype))
            shards.append(_shard(key, found[key], tuple(shape), (0,) * len(shape)))
        self._fill(shards)
        return found

    def _fill(self, shards: list[TensorShard]) -> None:
        pieces = [Piece(of_shard(shard), shard.data) for shard in shards if shard.data.numel()]
        read = fill_arrays if self._zarr else fill
        read(self._store, self._manifest, pieces)

    def _nbytes(self, key: str) -> int:
        dtype, shape = self._manifest.tensors.kind(key)
        return int(prod(shape) * getattr(torch, dtype).itemsize)


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor whose memory goes back to the system with it.

    Large blocks that come and go leave holes in what malloc keeps: 100 MiB of them were measured.
    """
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _shard(key: str, data: Tensor, shape: tuple[int, ...], offset: tuple[int, ...]) -> TensorShard:
    return TensorShard(
        key=key,
        data=data,
        global_shape=shape,
        offset=offset,
        local_shape=tuple(data.shape),
        dtype=str(data.dtype).removeprefix("torch."),
    )
