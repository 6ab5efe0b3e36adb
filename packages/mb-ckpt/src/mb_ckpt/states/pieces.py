# SPDX-License-Identifier: Apache-2.0
"""Pieces of global tensors: which values they hold, and the values."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from attrs import frozen

from mb_ckpt.errors import CheckpointError
from mb_ckpt.states.boxes import Box, flat_boxes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config.records import TensorShard
    from torch import Tensor

_NAMES = {
    value: str(value).removeprefix("torch.")
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


@frozen(kw_only=True, eq=False)
class Spec:
    """Which values of a global tensor a piece holds, without the values.

    Attributes:
        key: Name of the global tensor.
        dtype: As torch prints it, without the prefix.
        shape: Of the whole tensor.
        boxes: Where the values belong, in the order of the data; more than one only if the data is
            one-dimensional.
        held: Shape of the data.
        nbytes: Of the data.
        replica_id: 0 where this piece is the one to store, unless the work is spread.
        plain: Whether it was a plain tensor, the same on every rank.
        unique: Whether no other rank has any of these values.
        fixed: Whether only the rank with ``replica_id=0`` (of plain tensors: rank 0) may store it.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    held: tuple[int, ...]
    nbytes: int
    replica_id: int = 0
    plain: bool = False
    unique: bool = False
    fixed: bool = False

    def is_like(self, data: Tensor) -> bool:
        """Return whether *data* has the shape and dtype of the piece."""
        return self.held == data.shape and self.dtype == _NAMES[data.dtype]


@frozen(eq=False)
class Piece:
    """Values of a global tensor that are here.

    Attributes:
        spec: Which values.
        data: The values, without their graph.
    """

    spec: Spec
    data: Tensor

    def views(self) -> Iterator[tuple[Box, Tensor]]:
        """Yield each box with the part of ``data`` that belongs to it, in the box's shape."""
        boxes = self.spec.boxes
        if len(boxes) == 1:
            box = boxes[0]
            yield box, self.data if self.data.shape == box.shape else self.data.view(box.shape)
            return
        start = 0
        for box in boxes:
            yield box, self.data[start : start + box.volume].view(box.shape)
            start += box.volume


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of *dtype* without ``torch.``."""
    return _NAMES[dtype]


def whole(tensor: Tensor, key: str, *, fixed: bool = False) -> Spec:
    """Return the spec of a plain tensor."""
    shape = tuple(tensor.shape)
    return Spec(
        key=key,
        dtype=_NAMES[tensor.dtype],
        shape=shape,
        boxes=(Box((0,) * len(shape), shape),) if tensor.numel() else (),
        held=shape,
        nbytes=tensor.numel() * tensor.element_size(),
        plain=True,
        fixed=fixed,
    )


def of_shard(shard: TensorShard, *, unique: bool = False) -> Spec:
    """Return the spec of *shard*, a flat range or *unique* as nothing but its maker can tell.

    Raises:
        CheckpointError: If it contradicts itself; names it.
    """
    data, key = shard.data, shard.key
    ndim = len(shard.global_shape)
    if len(shard.offset) != ndim or len(shard.local_shape) != ndim:
        raise CheckpointError(f"shard {key!r}: offset and local_shape need {ndim} dimensions each")
    if dtype_name(data.dtype) != shard.dtype:
        raise CheckpointError(
            f"shard {key!r} says dtype={shard.dtype} but its data is {dtype_name(data.dtype)}"
        )
    for low, extent, size in zip(shard.offset, shard.local_shape, shard.global_shape, strict=True):
        if low < 0 or extent < 0 or low + extent > size:
            raise CheckpointError(
                f"shard {key!r}: offset={shard.offset} and local_shape={shard.local_shape} reach "
                f"outside of global_shape={shard.global_shape}"
            )
    boxes, expected = _boxes(shard)
    if tuple(data.shape) != expected:
        raise CheckpointError(
            f"shard {key!r}: data has shape {tuple(data.shape)}, expected {expected} from "
            f"local_shape={shard.local_shape} and flat_range={shard.flat_range}"
        )
    return Spec(
        key=key,
        dtype=shard.dtype,
        shape=tuple(shard.global_shape),
        boxes=boxes,
        held=expected,
        nbytes=data.numel() * data.element_size(),
        replica_id=shard.replica_id,
        # A distributed optimizer's: that is what flat ranges are for.
        unique=unique or shard.flat_range is not None,
    )


def _boxes(shard: TensorShard) -> tuple[tuple[Box, ...], tuple[int, ...]]:
    """Return the boxes of *shard* in global coordinates, and the shape its data must have."""
    local = tuple(shard.local_shape)
    if shard.flat_range is None:
        box = Box(tuple(shard.offset), local)
        return ((box,) if box.volume else ()), local
    start, stop = shard.flat_range
    if not 0 <= start <= stop <= prod(local):
        raise CheckpointError(
            f"shard {shard.key!r}: flat_range={shard.flat_range} is not within the "
            f"{prod(local)} elements of local_shape={local}"
        )
    boxes = tuple(
        Box(tuple(o + b for o, b in zip(shard.offset, part.offset, strict=True)), part.shape)
        for part in flat_boxes(local, start, stop)
    )
    return boxes, (stop - start,)
