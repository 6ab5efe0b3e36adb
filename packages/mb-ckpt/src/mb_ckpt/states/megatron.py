# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's sharded state dicts as pieces of global tensors, without importing Megatron."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen
from mb_config.records import TensorShard

from mb_ckpt.errors import CheckpointError
from mb_ckpt.states import plain_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAPPING = "megatron.core.dist_checkpointing.mapping"


@frozen(kw_only=True, eq=False)
class ObjectToFill:
    """A ``ShardedObject`` of a state that is loaded, and the key of its stored bytes."""

    key: str
    target: Any


def is_sharded(value: Any) -> bool:
    """Return whether *value* is what a ``sharded_state_dict`` of megatron-core has as leaves."""
    module = sys.modules.get(_MAPPING)
    return module is not None and isinstance(
        value, (module.ShardedBase, module.LocalNonpersistentObject)
    )


def pieces(value: Any) -> Iterator[TensorShard]:
    """Yield the pieces of a ``ShardedTensor`` or a ``ShardedTensorFactory``, without copies.

    Raises:
        CheckpointError: If a factory makes pieces that do not lie in the tensor it was given, which
            could not be filled.
    """
    if hasattr(value, "build_fn"):
        base = value.data.untyped_storage().data_ptr()
        for built in _leaves(value.build()):
            if built.data.untyped_storage().data_ptr() != base:
                raise CheckpointError(
                    f"state {built.key!r} is a copy made by a ShardedTensorFactory: give its pieces "
                    "as TensorShard"
                )
            yield from pieces(built)
        return
    if value.data is None:
        return
    local = (1,) * value.prepend_axis_num + tuple(value.local_shape)
    window = value.flattened_range
    data = value.data.detach()
    yield TensorShard(
        key=value.key,
        data=data.view(local) if window is None else data,
        global_shape=tuple(int(n) for n in value.global_shape),
        offset=tuple(int(n) for n in value.global_offset),
        local_shape=local,
        dtype=str(data.dtype).removeprefix("torch."),
        replica_id=_replica(value),
        flat_range=None if window is None else (window.start, window.stop),
    )


def is_object(value: Any) -> bool:
    """Return whether *value* is a ``ShardedObject``."""
    return isinstance(value, sys.modules[_MAPPING].ShardedObject)


def is_local(value: Any) -> bool:
    """Return whether *value* is a ``LocalNonpersistentObject``, which is not stored."""
    return isinstance(value, sys.modules[_MAPPING].LocalNonpersistentObject)


def object_shard(value: Any) -> TensorShard | None:
    """Return a ``ShardedObject`` as a piece of bytes of its own; None if another replica has it.

    Raises:
        CheckpointError: If it is neither plain data with arrays in them nor a file in memory.
    """
    if _replica(value):
        return None
    return TensorShard.whole(value.unique_key, encode_object(value.data, value.unique_key))


def encode_object(data: Any, key: str) -> torch.Tensor:
    """Return the ``data`` of a ``ShardedObject`` as it is stored: one-dimensional uint8.

    Raises:
        CheckpointError: If it is neither plain data with arrays in them nor a file in memory; names
            *key*.
    """
    kind = "plain"
    if isinstance(data, io.BytesIO):
        kind, data = "file", data.getvalue()
    text = json.dumps({kind: _encoded(data, key)}, allow_nan=False).encode()
    return torch.from_numpy(np.frombuffer(text, np.uint8).copy())


def decode_object(stored: torch.Tensor) -> Any:
    """Return the ``data`` of a ``ShardedObject`` from the bytes that were stored for it."""
    ((kind, tree),) = json.loads(stored.numpy().tobytes()).items()
    data = plain_tree.decode(tree)
    return io.BytesIO(data) if kind == "file" else data


def fill_object(item: ObjectToFill, stored: torch.Tensor) -> None:
    """Give a ``ShardedObject`` its ``data`` back, from the bytes that were stored for it."""
    item.target.data = decode_object(stored)


def _encoded(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        items = [(k, _encoded(v, f"{path}.{k}")) for k, v in value.items()]
        if any(isinstance(k, (tuple, torch.dtype)) for k in value):
            return {"$dict": [[_encoded(k, f"{path}, a key"), v] for k, v in items]}
        return plain_tree.encode_items(items)
    if isinstance(value, (list, tuple)):
        items_ = [_encoded(v, f"{path}.{i}") for i, v in enumerate(value)]
        return {"$tuple": items_} if isinstance(value, tuple) else items_
    if isinstance(value, (torch.Tensor, np.ndarray)) and _holds_numbers(value):
        return plain_tree.encode_array(value)
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, np.generic):
        value = value.item()
    return plain_tree.encode_scalar(value, path)


def _holds_numbers(value: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"
    return value.layout is torch.strided and not value.is_meta and not value.is_quantized


def _replica(value: Any) -> int:
    replica = value.replica_id
    return int(any(replica)) if isinstance(replica, tuple) else int(replica != 0)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if not isinstance(tree, (list, tuple)):
        yield tree
        return
    for value in tree:
        yield from _leaves(value)
