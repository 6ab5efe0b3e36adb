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


class StoredRows:
    """Reads rows of the tensors of one step.

    Small tensors that are asked for in order are read many at a time, once.

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

    def tensor(self, key: str) -> TensorToRead:
        """Return the tensor *key*; reading it raises `CorruptCheckpointError` on damage."""
        dtype, shape = self._manifest.tensors.kind(key)
        rows = partial(self._read, key)
        return TensorToRead(dtype=getattr(torch, dtype), shape=tuple(shape), read_rows=rows)

    def _read(self, key: str, start: int, stop: int) -> Tensor:
        dtype, shape = self._manifest.tensors.kind(key)
        if key in self._places:
            if key not in self._held:
                self._held = {}  # first: never twice as much
                self._held = self._read_ahead(self._places[key])
            found = self._held[key]
            return found[start:stop] if shape else found
        rows = _room((stop - start, *shape[1:]), getattr(torch, dtype))
        first = (start, *(0 for _ in shape[1:]))
        self._fill([_shard(key, rows, tuple(shape), first)])
        return rows

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
        read = fill_arrays if self._manifest.layout == "zarr" else fill
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
