# SPDX-License-Identifier: Apache-2.0
"""Layers that Megatron stores stacked in one tensor, one by one.

Where all layers are alike, megatron-core's keys are ``decoder.layers.mlp.linear_fc1.weight`` for a
tensor with the layers as its first dimension; where they may differ, as in mb-engine, they are
``decoder.layers.0.mlp.linear_fc1.weight`` and so on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from mb_ckpt.errors import CheckpointError
from mb_ckpt.states.storable import TensorToRead

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_STACKED = re.compile(r"^(?P<before>(?:.*\.)?layers\.)(?!\d+\.)(?P<after>.+)$")
_OBJECT = re.compile(r"^(?P<key>.*)/shard_(?P<offset>[\d.]+)_(?P<shape>[\d.]+)$")


def split_layers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return *state*, of a ``torch_dist`` folder, with the entries of each layer apart.

    Args:
        state: By key; sharded objects are one-dimensional uint8 under ``KEY/shard_OFFSET_SHAPE``.

    Raises:
        CheckpointError: If no layers are stacked, or a key would be there twice.
    """
    out: dict[str, Any] = {}
    found = False
    for key, value in state.items():
        stacked = _STACKED.match(key)
        parts = {key: value}
        if stacked is not None:
            named = _OBJECT.match(key)
            if named is not None:
                parts = {_object_of_layer(stacked["before"], stacked["after"]): value}
            elif isinstance(value, TensorToRead) and value.shape:
                parts = _layers(value, stacked["before"], stacked["after"])
            found = found or key not in parts
        for name, part in parts.items():
            if name in out:
                raise CheckpointError(
                    f"split_layers: {key!r} gives {name!r}, which is there already"
                )
            out[name] = part
    if not found:
        raise CheckpointError(
            "split_layers=True, but no tensor of the checkpoint holds stacked layers, such as "
            "decoder.layers.mlp.linear_fc1.weight: leave it out"
        )
    return out


def _layers(tensor: TensorToRead, before: str, after: str) -> dict[str, TensorToRead]:
    return {
        f"{before}{i}.{after}": TensorToRead(
            dtype=tensor.dtype, shape=tensor.shape[1:], read_rows=_Layer(tensor, i).read
        )
        for i in range(tensor.shape[0])
    }


class _Layer:
    """One layer of a stacked tensor, read once and held while rows of it are asked for."""

    def __init__(self, stacked: TensorToRead, number: int) -> None:
        self._stacked = stacked
        self._number = number
        self._held: Tensor | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows of the layer."""
        if self._held is None:
            self._held = self._stacked.read_rows(self._number, self._number + 1)[0]
        layer = self._held
        if not layer.dim() or stop >= len(layer):
            self._held = None
        return layer[start:stop] if layer.dim() else layer


def _object_of_layer(before: str, after: str) -> str:
    named = _OBJECT.match(after)
    assert named is not None
    layer, *offset = named["offset"].split(".")
    _, *shape = named["shape"].split(".")
    place = f"{'.'.join(offset) or '0'}_{'.'.join(shape) or '1'}"
    return f"{before}{layer}.{named['key']}/shard_{place}"
