# SPDX-License-Identifier: Apache-2.0
"""Model and optimizer state as pieces of global tensors, in any parallel layout.

Model tensors come from megatron-core's ``sharded_state_dict``. Optimizer state is expressed in the
same model space: where the distributed optimizer owns a flat range of a parameter, the piece
carries that range. So any layout can load what any other layout saved.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from mb_config.records import TensorShard

from mb_engine.errors import EngineError
from mb_engine.parallel.optimizer_state import optimizer_steps, parameter_states
from mb_engine.precision.quantized import STANDS_FOR

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

# One key a layer, so that a layer's name does not depend on what else the model holds.
_METADATA = {"non_homogeneous_layers": True}


@frozen(kw_only=True, eq=False)
class Piece:
    """A box of a global tensor and where it lies in the flattened local parameter."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    replica_id: tuple[int, ...]
    start: int
    data: Tensor

    @property
    def stop(self) -> int:
        """The end of the box in the flattened local parameter."""
        return self.start + math.prod(self.local_shape)

    def shard(self, key: str, data: Tensor) -> TensorShard:
        """Return the record of *data*, the whole box."""
        return TensorShard(
            key=key,
            data=data.view(self.local_shape),
            global_shape=self.global_shape,
            offset=self.offset,
            local_shape=self.local_shape,
            dtype=_dtype_name(data),
            replica_id=int(any(self.replica_id)),
        )

    def range_shard(self, key: str, data: Tensor, flat_range: tuple[int, int]) -> TensorShard:
        """Return the record of *data*, elements of the flattened box that no other replica has."""
        return TensorShard(
            key=key,
            data=data,
            global_shape=self.global_shape,
            offset=self.offset,
            local_shape=self.local_shape,
            dtype=_dtype_name(data),
            # The last coordinate is that of the replicas, which share the box.
            replica_id=int(any(self.replica_id[:-1])),
            flat_range=flat_range,
        )


def _pieces(entry: Any) -> Iterator[Piece]:
    """Yield the boxes of one entry of a sharded state dict: a ShardedTensor or a factory."""
    built = entry.build() if hasattr(entry, "build") else [entry]
    base = entry.data.detach()
    for sharded in _leaves(built):
        view = sharded.data.detach()
        if not view.is_contiguous():
            raise EngineError(
                f"{sharded.key}: its pieces are not contiguous in memory; this model cannot be"
                " checkpointed, please report its configuration"
            )
        replica = sharded.replica_id
        yield Piece(
            key=sharded.key,
            global_shape=tuple(int(n) for n in sharded.global_shape),
            offset=tuple(int(n) for n in sharded.global_offset),
            local_shape=(1,) * sharded.prepend_axis_num + tuple(sharded.local_shape),
            replica_id=replica if isinstance(replica, tuple) else (replica,),
            start=view.storage_offset() - base.storage_offset(),
            data=view,
        )


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree


def _entries(chunks: Sequence[Any]) -> Iterator[Any]:
    """Yield the sharded tensors and factories of all model chunks; metadata objects are left out."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for chunk in chunks:
        for entry in _leaves(chunk.sharded_state_dict(metadata=dict(_METADATA))):
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and entry.data is not None:
                yield entry


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def model_shards(chunks: Sequence[nn.Module], *, prefix: str = "model.") -> list[TensorShard]:
    """Return this rank's pieces of every parameter and persistent buffer.

    Args:
        chunks: Model chunks of this rank, without wrappers for data parallelism.
        prefix: Put before every key.
    """
    return [
        piece.shard(prefix + piece.key, piece.data)
        for entry in _entries(chunks)
        for piece in _pieces(entry)
    ]


def pieces_by_name(chunk: nn.Module) -> dict[str, list[Piece]]:
    """Return what of the whole model each parameter and persistent buffer of *chunk* is.

    Args:
        chunk: A model chunk of this rank, whole.

    Returns:
        Pieces without their values, by the tensor's name in *chunk*.
    """
    names = {
        id(tensor): name for name, tensor in chain(chunk.named_parameters(), chunk.named_buffers())
    }
    return {
        names[id(entry.data)]: [evolve(p, data=p.data.new_empty(0)) for p in _pieces(entry)]
        for entry in _entries([chunk])
        if id(entry.data) in names
    }


def optimizer_shards(
    chunks: Sequence[nn.Module], optimizer: Any, *, prefix: str = "optimizer."
) -> list[TensorShard]:
    """Return this rank's pieces of the optimizer state, in model space.

    Keys are ``<prefix><state name>.<model key>``, with ``main_param`` for the float32 copy of a
    16-bit parameter. Nothing is kept of a float32 parameter's own value: that is the model's.

    Args:
        chunks: Model chunks of this rank, without wrappers for data parallelism.
        optimizer: A megatron-core optimizer whose state is allocated.
        prefix: Put before every key.
    """
    # A plain copy may stand in for a parameter kept in FP8; the optimizer knows the parameter.
    pieces = {
        id(getattr(entry.data, STANDS_FOR, entry.data)): list(_pieces(entry))
        for entry in _entries(chunks)
    }
    shards: list[TensorShard] = []
    for state in parameter_states(optimizer):
        boxes = pieces.get(id(state.param))
        if boxes is None:
            raise EngineError(
                f"a parameter of shape {tuple(state.param.shape)} is optimized but not part of the"
                " model's sharded state dict, so its state cannot be saved"
            )
        for name, tensor in state.tensors.items():
            for box in boxes:
                shard = state_shard(f"{prefix}{name}.{box.key}", box, tensor, state.flat_range)
                if shard is not None:
                    shards.append(shard)
    return shards


def state_shard(
    key: str, box: Piece, tensor: Tensor, flat_range: tuple[int, int] | None
) -> TensorShard | None:
    """Return the part of one state tensor that lies in *box*, or None if there is none.

    *tensor* covers ``flat_range`` of the flattened local parameter, or all of it.
    """
    flat = tensor.detach().reshape(-1)
    if flat_range is None:
        return box.shard(key, flat[box.start : box.stop])
    first, last = flat_range
    start, stop = max(first, box.start), min(last, box.stop)
    if start >= stop:
        return None
    data = flat[start - first : stop - first]
    return box.range_shard(key, data, (start - box.start, stop - box.start))


def optimizer_plain_state(optimizer: Any) -> dict[str, Any]:
    """Return what of the optimizer is the same on every rank: step counts and loss scaling."""
    plain: dict[str, Any] = {"step": max(optimizer_steps(optimizer), default=0)}
    scalers = [getattr(o, "grad_scaler", None) for o in _each(optimizer)]
    scaler_state: dict[str, Any] = next((s.state_dict() for s in scalers if s is not None), {})
    if scaler_state:
        plain["grad_scaler"] = {
            k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in scaler_state.items()
        }
    return plain


def load_optimizer_plain_state(optimizer: Any, plain: Mapping[str, Any]) -> None:
    """Restore what :func:`optimizer_plain_state` returned."""
    from mb_engine.parallel.optimizer_state import set_optimizer_steps

    set_optimizer_steps(optimizer, int(plain["step"]))
    scaler_state = plain.get("grad_scaler")
    for one in _each(optimizer):
        scaler = getattr(one, "grad_scaler", None)
        if scaler is not None and scaler_state:
            restored = dict(scaler_state)
            restored["scale"] = torch.tensor(restored["scale"], dtype=torch.float32)
            scaler.load_state_dict(restored)


def _each(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
