# SPDX-License-Identifier: Apache-2.0
"""Nested state as a flat list of tensor pieces and a tree of plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from mb_config.records import TensorShard
from torch import Tensor

from mb_ckpt.errors import CheckpointError
from mb_ckpt.states import megatron, plain_tree
from mb_ckpt.states.dtensors import (
    is_dtensor,
    is_fully_sharded,
    layout_of,
    local_of,
    local_shard,
)
from mb_ckpt.states.megatron import is_sharded
from mb_ckpt.states.memo import KnownMapping, Memo
from mb_ckpt.states.pieces import Spec, of_shard, whole
from mb_ckpt.states.storable import (
    TENSORS,
    Rows,
    TensorToRead,
    check_readable,
    check_storable,
)


@frozen(kw_only=True, eq=False)
class Stateful:
    """An object of the state that is filled through its own ``load_state_dict``."""

    path: str
    target: Any


@frozen(kw_only=True, eq=False)
class FlatState:
    """What `flatten` returns.

    Attributes:
        specs: Of all tensors and shards.
        tensors: Their values, in the same order; they may require gradients.
        tree: Plain data as JSON, with marks where plain tensors were.
        modules: Modules of the state; their tensors are among ``tensors``.
        statefuls: Other objects with a state, when loading; their tensors are not among them.
        changing: Indices of values that a forward pass may change: buffers of modules.
        objects: Objects of megatron-core, when loading.
        readers: By index, what reads values that are to be read when they are written.
    """

    specs: list[Spec] = field(factory=list)
    tensors: list[Tensor] = field(factory=list)
    tree: Any = None
    modules: list[Stateful] = field(factory=list)
    statefuls: list[Stateful] = field(factory=list)
    changing: list[int] = field(factory=list)
    objects: list[megatron.ObjectToFill] = field(factory=list)
    readers: dict[int, Rows] = field(factory=dict)


def flatten(
    state: Mapping[str, Any],
    *,
    loading: bool = False,
    memo: Memo | None = None,
    pickles: bool = False,
) -> FlatState:
    """Return the pieces and the plain data of a nested *state*.

    Args:
        state: See `CheckpointStore.save`.
        loading: Set objects with ``load_state_dict`` that are not modules apart instead of asking
            for their ``state_dict``, which is empty before the first step of an optimizer.
        memo: Of an earlier call. Specs that are met again are taken from there, the very objects; it
            then holds those of this state alone.
        pickles: Whether to pickle objects that are nothing plain, instead of refusing them.

    Raises:
        CheckpointError: If a leaf cannot be stored, a shard contradicts itself or two plain tensors
            have one key.
    """
    walk = _Walk(loading=loading, known=Memo() if memo is None else memo, pickles=pickles)
    with torch.no_grad():
        tree = walk.visit(state, "")
    if memo is not None:
        memo.take(walk.met)
    return FlatState(
        specs=walk.specs,
        tensors=walk.tensors,
        tree=tree,
        modules=walk.modules,
        statefuls=walk.statefuls,
        changing=walk.changing,
        objects=walk.objects,
        readers=walk.readers,
    )


class _Walk:
    """One walk over a state. Written for states of 10,000 small tensors: few steps a tensor."""

    def __init__(self, *, loading: bool, known: Memo, pickles: bool) -> None:
        self.loading = loading
        self.pickles = pickles
        self.known = known
        self.met = Memo()
        self.specs: list[Spec] = []
        self.tensors: list[Tensor] = []
        self.modules: list[Stateful] = []
        self.statefuls: list[Stateful] = []
        self.changing: list[int] = []
        self.objects: list[megatron.ObjectToFill] = []
        self.readers: dict[int, Rows] = {}
        self.seen: dict[str, bool] = {}
        self.buffers: set[str] = set()

    def visit(self, value: Any, path: str) -> Any:
        """Take in *value*, found at the dotted *path*; return what of it is plain data."""
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, TensorShard):
            self._shard(value)
            return plain_tree.ABSENT
        if isinstance(value, Mapping):
            return self._mapping(value, f"{path}." if path else "")
        if isinstance(value, (list, tuple)):
            return self._sequence(value, path)
        return self._other(value, path)

    def _mapping(self, value: Mapping[Any, Any], below: str) -> Any:
        if (again := self.known.mappings.get(below)) and self._take_again(again, value, below):
            return again.tree
        items, first = [], len(self.specs)
        for key, item in value.items():
            path = f"{below}{key}"
            if type(item) in TENSORS:  # nearly always: spared the questions that others need
                self._plain(item, path)
                items.append((key, {"$tensor": path}))
                continue
            plain = self.visit(item, path)
            if plain is not plain_tree.ABSENT:
                items.append((key, plain))
        tree = plain_tree.encode_items(items)
        self._remember(value, below, tree, first)
        return tree

    def _take_again(self, again: KnownMapping, value: Mapping[Any, Any], below: str) -> bool:
        """Take in all of *value* at once, if nothing of it is new but its values."""
        tensors = again.tensors(value, TENSORS, self.buffers)
        if tensors is None or not self.seen.keys().isdisjoint(again.specs):
            return False
        self.changing += [len(self.specs) + i for i in again.changing]
        self.specs += again.specs.values()
        self.tensors += tensors
        self.seen |= dict.fromkeys(again.specs, True)
        self.met.specs.update(again.specs)
        self.met.mappings[below] = again
        return True

    def _remember(self, value: Mapping[Any, Any], below: str, tree: Any, first: int) -> None:
        """Keep what was found of *value*, whose specs begin at *first*, if it is tensors alone."""
        found = KnownMapping.of(value, TENSORS, self.specs[first:], self.buffers, tree)
        if found is not None:
            self.met.mappings[below] = found

    def _tensor(self, value: Tensor, path: str) -> Any:
        if type(value) not in TENSORS and is_dtensor(value):
            if self._take_dtensor_again(value, path):
                return {"$tensor": path}
            shard = local_shard(value, path)
            if shard is None:
                return plain_tree.ABSENT
            self._shard(shard, unique=is_fully_sharded(value))
            self.met.dtensors[path] = (layout_of(value), self.specs[-1])
        else:
            self._plain(value, path)
        return {"$tensor": path}

    def _take_dtensor_again(self, value: Any, path: str) -> bool:
        """Take in a DTensor that is split as the last one there was, without asking how."""
        known = self.known.dtensors.get(path)
        if known is None:
            return False
        layout, spec = known
        now = layout_of(value)
        if layout is not now and layout != now:
            return False
        data = local_of(value)
        same = type(data) in TENSORS and spec.is_like(data)
        if not same or data.is_meta or data.is_conj() or data.is_neg():
            return False
        if self.seen.setdefault(spec.key, False):  # refused by the usual way
            return False
        self.met.dtensors[path] = (now, spec)
        self.specs.append(spec)
        self.tensors.append(data)
        return True

    def _other(self, value: Any, path: str) -> Any:
        if is_sharded(value):
            self._megatron(value)
            return plain_tree.ABSENT
        if isinstance(value, TensorToRead):
            return self._to_read(value, path)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return self._array(value, path)
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            return self._object(value, path)
        if isinstance(value, np.generic):
            value = value.item()
        if self.pickles and not isinstance(value, plain_tree.SCALARS):
            value = plain_tree.Pickled.of(value, path)
        return plain_tree.encode_scalar(value, path)

    def _megatron(self, value: Any) -> None:
        if megatron.is_local(value):
            return
        if not megatron.is_object(value):
            for shard in megatron.pieces(value):
                self._shard(shard)
        elif self.loading:
            item = megatron.ObjectToFill(key=value.unique_key, target=value)
            self.objects.append(item)
        else:
            stored = megatron.object_shard(value)
            if stored is not None:
                self._shard(stored)

    def _sequence(self, value: list[Any] | tuple[Any, ...], path: str) -> Any:
        items = [self.visit(v, f"{path}.{i}") for i, v in enumerate(value)]
        if items and all(item is plain_tree.ABSENT for item in items):
            return plain_tree.ABSENT
        items = [None if item is plain_tree.ABSENT else item for item in items]
        return {"$tuple": items} if isinstance(value, tuple) else items

    def _to_read(self, value: TensorToRead, path: str) -> Any:
        if not value.nbytes or not value.shape:
            data = value.read_rows(0, 1) if value.nbytes else torch.empty(value.shape)
            self._plain(data.to(value.dtype).reshape(value.shape), path)
        else:
            self._see_plain(path)
            data = torch.empty(value.shape, dtype=value.dtype, device="meta")
            self.readers[len(self.specs)] = value.read_rows
            self.specs.append(whole(data, path))
            self.tensors.append(data)
        return {"$tensor": path}

    def _array(self, value: np.ndarray[Any, Any], path: str) -> Any:
        if value.dtype.kind not in "biufc" or not value.dtype.isnative or not value.flags.writeable:
            raise CheckpointError(
                f"state {path!r} is a numpy array of {value.dtype}, byte order "
                f"{value.dtype.byteorder!r}, writeable={value.flags.writeable}: only writeable "
                "arrays of numbers in this machine's byte order can be stored and filled"
            )
        self._plain(torch.from_numpy(value), path)
        return {"$tensor": path}

    def _object(self, value: Any, path: str) -> Any:
        item = Stateful(path=path, target=value)
        if not isinstance(value, torch.nn.Module):
            if self.loading:
                self.statefuls.append(item)
                return None
            return self.visit(value.state_dict(), path)
        self.modules.append(item)
        self.buffers = {f"{path}.{name}" if path else name for name, _ in value.named_buffers()}
        tree = self.visit(value.state_dict(), path)
        self.buffers = set()
        return tree

    def _see_plain(self, key: str) -> None:
        if key in self.seen:
            raise CheckpointError(f"two tensors of the state have the key {key!r}: rename one")
        self.seen[key] = True

    def _plain(self, tensor: Tensor, key: str) -> None:
        self._see_plain(key)
        spec, fixed = self.known.specs.get(key), key in self.buffers
        if spec is None or not spec.is_like(tensor) or spec.fixed != fixed:
            spec = whole(tensor, key, fixed=fixed)
        if not (
            tensor.layout is torch.strided
            and type(tensor) in TENSORS
            and not (tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        ):
            check_storable(tensor, key)
        if spec.fixed:
            self.changing.append(len(self.specs))
        self.met.specs[key] = spec
        self.specs.append(spec)
        self.tensors.append(tensor)

    def _shard(self, shard: TensorShard, *, unique: bool = False) -> None:
        data = shard.data
        identity = (
            shard.key, shard.dtype, shard.global_shape, shard.offset, shard.local_shape,
            shard.flat_range, shard.replica_id, unique,
        )  # fmt: skip
        spec = self.known.specs.get(identity)
        if spec is None or not spec.is_like(data):
            spec = of_shard(shard, unique=unique)
        if shard.read_rows is None or self.loading:
            check_storable(data, shard.key)
        else:
            check_readable(data, shard.key)
            self.readers[len(self.specs)] = shard.read_rows
        self.seen.setdefault(shard.key, False)
        if self.seen[shard.key]:
            raise CheckpointError(
                f"two tensors of the state have the key {shard.key!r}: rename one"
            )
        self.met.specs[identity] = spec
        self.specs.append(spec)
        self.tensors.append(data)
