# SPDX-License-Identifier: Apache-2.0
"""DTensors, such as the parameters and optimizer state of FSDP2, as pieces of global tensors."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from mb_config.records import TensorShard

from mb_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_MOST_PLACES = 1 << 14
_PLACES: dict[Any, tuple[tuple[int, ...], tuple[int, ...], int]] = {}


def is_dtensor(value: Any) -> bool:
    """Return whether *value* is a DTensor, without importing what defines them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_fully_sharded(value: Any) -> bool:
    """Return whether the pieces of a DTensor are all different."""
    return all(placement.is_shard() for placement in value.placements)


def layout_of(value: Any) -> Any:
    """Return how a DTensor is split, to be compared; the very object as long as the DTensor lives."""
    return value._spec  # noqa: SLF001  # what is public takes longer to ask than all the rest


def local_of(value: Any) -> Tensor:
    """Return this rank's values of a DTensor, without a graph."""
    data: Tensor = value._local_tensor  # noqa: SLF001
    return data


def local_shard(value: Any, key: str) -> TensorShard | None:
    """Return this rank's piece of a DTensor; None if the rank is not in its mesh.

    Of ranks that hold the same piece, the one with coordinate 0 along every mesh dimension that
    replicates has ``replica_id=0``.

    Args:
        value: A DTensor, sharded or replicated along each dimension of its mesh.
        key: Name to store it under.

    Raises:
        CheckpointError: If it holds partial sums.
    """
    mesh, placements = value.device_mesh, value.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    if any(placement.is_partial() for placement in placements):
        raise CheckpointError(
            f"state {key!r} is a DTensor of partial sums, {placements}: redistribute it first"
        )
    global_shape = tuple(value.shape)
    # Depends on these alone, and takes longer than all the rest.
    asked = (global_shape, tuple(mesh.shape), tuple(coordinate), tuple(placements))
    known = _PLACES.get(asked)
    if known is None:
        if len(_PLACES) >= _MOST_PLACES:
            _PLACES.clear()
        known = _PLACES[asked] = _place(value.shape, mesh, placements)
    shape, offset, replica_id = known
    return TensorShard(
        key=key,
        data=_local(value),
        global_shape=global_shape,
        offset=offset,
        local_shape=shape,
        dtype=str(value.dtype).removeprefix("torch."),
        replica_id=replica_id,
    )


def _place(shape: Any, mesh: Any, placements: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return local shape, offset and ``replica_id`` of this rank's piece."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    coordinates = zip(mesh.get_coordinate(), placements, strict=True)
    replicated = (c for c, p in coordinates if p.is_replicate())
    return tuple(local), tuple(offset), int(any(replicated))


def _local(value: Any) -> Tensor:
    if torch.is_grad_enabled():
        value = value.detach()  # else there would be a graph of it
    data: Tensor = value.to_local()
    return data


def room_like_parameter(target: Any, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Return room for the optimizer state *name*, split as its parameter is.

    Args:
        target: The object that is loaded.
        name: Dotted path in its ``state_dict``, such as ``state.3.exp_avg``.
        shape: Of the whole stored tensor.
        dtype: Of it, as torch prints it.

    Returns:
        A DTensor, or None if *target* is no optimizer, or the parameter no DTensor of that shape.
    """
    parts = name.split(".")
    if not isinstance(target, torch.optim.Optimizer) or len(parts) != 3 or parts[0] != "state":
        return None
    parameters = [p for group in target.param_groups for p in group["params"]]
    index = int(parts[1]) if parts[1].isdigit() else len(parameters)
    if index >= len(parameters) or not is_dtensor(parameters[index]):
        return None
    parameter = parameters[index]
    if tuple(parameter.shape) != shape:
        return None
    return torch.empty_like(parameter.detach(), dtype=getattr(torch, dtype))
