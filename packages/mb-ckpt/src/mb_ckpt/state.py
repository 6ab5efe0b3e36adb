# SPDX-License-Identifier: Apache-2.0
"""Nested state as a flat list of tensor pieces and a tree of plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from mb_config.records import TensorShard
from torch import Tensor

from mb_ckpt import plain_tree
from mb_ckpt.boxes import Box, flat_boxes
from mb_ckpt.errors import CheckpointError


@frozen(kw_only=True, eq=False)
class Piece:
    """Values of a global tensor that are here.

    Attributes:
        key: Name of the global tensor.
        dtype: As torch prints it, without the prefix.
        shape: Of the whole tensor.
        boxes: Where the values belong, in the order of ``data``; more than one only if ``data`` is
            one-dimensional.
        data: The values, without their graph.
        replica_id: 0 where this piece is the one to store.
        plain: Whether it was a plain tensor, the same on every rank.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    data: Tensor
    replica_id: int = 0
    plain: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.data.numel() * self.data.element_size()

    def views(self) -> Iterator[tuple[Box, Tensor]]:
        """Yield each box with the part of ``data`` that belongs to it, in the box's shape."""
        if len(self.boxes) == 1:
            box = self.boxes[0]
            yield box, self.data if self.data.shape == box.shape else self.data.view(box.shape)
            return
        start = 0
        for box in self.boxes:
            yield box, self.data[start : start + box.volume].view(box.shape)
            start += box.volume


@frozen(kw_only=True, eq=False)
class Stateful:
    """An object of the state that is filled through its own ``load_state_dict``."""

    path: tuple[str, ...]
    target: Any


@frozen(kw_only=True, eq=False)
class FlatState:
    """What `flatten` returns.

    Attributes:
        pieces: All tensors and shards.
        tree: Plain data as JSON, with marks where plain tensors were.
        modules: Modules of the state; their tensors are among ``pieces``.
        statefuls: Other objects with a state, when loading; their tensors are not among ``pieces``.
    """

    pieces: list[Piece] = field(factory=list)
    tree: Any = None
    modules: list[Stateful] = field(factory=list)
    statefuls: list[Stateful] = field(factory=list)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of *dtype* without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def flatten(state: Mapping[str, Any], *, loading: bool = False) -> FlatState:
    """Return the pieces and the plain data of a nested *state*.

    Args:
        state: See `CheckpointStore.save`.
        loading: Set objects with ``load_state_dict`` that are not modules apart instead of asking
            for their ``state_dict``, which is empty before the first step of an optimizer.

    Raises:
        CheckpointError: If a leaf cannot be stored, a shard contradicts itself or two plain tensors
            have one key.
    """
    flat = FlatState()
    tree = _walk(state, (), flat, loading)
    seen: set[str] = set()
    for piece in flat.pieces:
        if piece.plain and piece.key in seen:
            raise CheckpointError(
                f"two tensors of the state have the key {piece.key!r}: rename one"
            )
        seen.add(piece.key)
    return FlatState(pieces=flat.pieces, tree=tree, modules=flat.modules, statefuls=flat.statefuls)


def _walk(  # noqa: PLR0911  # one return a kind of leaf
    value: Any, path: tuple[str, ...], flat: FlatState, loading: bool
) -> Any:
    if isinstance(value, TensorShard):
        flat.pieces.append(_from_shard(value))
        return plain_tree.ABSENT
    if isinstance(value, Tensor):
        flat.pieces.append(whole(value, ".".join(path)))
        return {"$tensor": ".".join(path)}
    if isinstance(value, Mapping):
        items = [(k, _walk(v, (*path, str(k)), flat, loading)) for k, v in value.items()]
        return plain_tree.encode_items([(k, v) for k, v in items if v is not plain_tree.ABSENT])
    if isinstance(value, (list, tuple)):
        return _walk_sequence(value, path, flat, loading)
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        if isinstance(value, torch.nn.Module):
            flat.modules.append(Stateful(path=path, target=value))
        elif loading:
            flat.statefuls.append(Stateful(path=path, target=value))
            return None
        return _walk(value.state_dict(), path, flat, loading)
    if isinstance(value, np.generic):
        value = value.item()
    return plain_tree.encode_scalar(value, ".".join(path))


def _walk_sequence(
    value: list[Any] | tuple[Any, ...], path: tuple[str, ...], flat: FlatState, loading: bool
) -> Any:
    items = [_walk(v, (*path, str(i)), flat, loading) for i, v in enumerate(value)]
    if items and all(item is plain_tree.ABSENT for item in items):
        return plain_tree.ABSENT
    items = [None if item is plain_tree.ABSENT else item for item in items]
    return {"$tuple": items} if isinstance(value, tuple) else items


def whole(tensor: Tensor, key: str) -> Piece:
    """Return the one piece of a plain tensor."""
    data = _storable(tensor, key)
    shape = tuple(data.shape)
    boxes = (Box((0,) * len(shape), shape),) if data.numel() else ()
    dtype = dtype_name(data.dtype)
    return Piece(key=key, dtype=dtype, shape=shape, boxes=boxes, data=data, plain=True)


def _from_shard(shard: TensorShard) -> Piece:
    data, key = _storable(shard.data, shard.key), shard.key
    ndim = len(shard.global_shape)
    if len(shard.offset) != ndim or len(shard.local_shape) != ndim:
        raise CheckpointError(f"shard {key!r}: offset and local_shape need {ndim} dimensions each")
    if dtype_name(data.dtype) != shard.dtype:
        raise CheckpointError(
            f"shard {key!r} says dtype={shard.dtype} but its data is {dtype_name(data.dtype)}"
        )
    for low, extent, whole in zip(shard.offset, shard.local_shape, shard.global_shape, strict=True):
        if low < 0 or extent < 0 or low + extent > whole:
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
    return Piece(
        key=key,
        dtype=shard.dtype,
        shape=tuple(shard.global_shape),
        boxes=boxes,
        data=data,
        replica_id=shard.replica_id,
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


def _storable(tensor: Tensor, key: str) -> Tensor:
    """Return *tensor* without its graph, or refuse kinds whose values are not all in it."""
    data = tensor.detach()
    if type(data) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise CheckpointError(
            f"state {key!r} is a {type(data).__name__}: give its local piece as a TensorShard"
        )
    if data.is_conj() or data.is_neg():
        raise CheckpointError(f"state {key!r} is a lazy conjugate: use its .resolve_conj()")
    if data.layout != torch.strided or data.is_quantized or data.device.type == "meta":
        raise CheckpointError(
            f"state {key!r} is {data.layout}, {data.dtype} on {data.device}: only dense, "
            "unquantised tensors with data can be stored"
        )
    return data
