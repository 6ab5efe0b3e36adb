# SPDX-License-Identifier: Apache-2.0
"""Parameters in FP8 or FP4, and the scaling history of FP8, in checkpoints.

A checkpoint holds parameters in the 16-bit dtype whatever they are kept in, so that any precision
can load what any other saved. Delayed scaling takes its scales from the largest values of earlier
steps; a run resumes exactly only if that history is in the checkpoint too. Other scalings have no
state.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from mb_config.records import TensorShard
from torch import nn

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mb_config.records import ProcessLayout
    from torch import Tensor

STANDS_FOR = "stands_for"
"""Attribute of a plain copy: the quantized parameter in whose place it is."""

_HEADER_BYTES = 8
_RECIPE_BYTES = 16 * 1024
_BYTES_A_STEP = 24  # three tensors forward and two backward, float32, and some to spare


def is_quantized(tensor: Any) -> bool:
    """Return whether *tensor* keeps its values in FP8 or FP4."""
    from megatron.core.fp4_utils import is_nvfp4tensor
    from megatron.core.fp8_utils import is_float8tensor

    return bool(is_float8tensor(tensor) or is_nvfp4tensor(tensor))


@contextmanager
def plain_parameters(chunks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Have 16-bit copies stand in for quantized parameters of *chunks* for a while.

    Yields:
        The copies, each with its parameter as ``stands_for``.
    """
    places = [
        (module, name, parameter)
        for chunk in chunks
        for module in chunk.modules()
        for name, parameter in module._parameters.items()  # noqa: SLF001 - swapped in place
        if parameter is not None and is_quantized(parameter)
    ]
    copies: dict[int, Any] = {}
    for _, _, parameter in places:
        if id(parameter) not in copies:
            plain = nn.Parameter(parameter.dequantize().detach(), requires_grad=False)
            plain.stands_for = parameter  # type: ignore[attr-defined]
            copies[id(parameter)] = plain
    try:
        for module, name, parameter in places:
            module._parameters[name] = copies[id(parameter)]  # noqa: SLF001
        yield list(copies.values())
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter  # noqa: SLF001


@torch.no_grad()
def quantize_again(copies: Sequence[Any]) -> None:
    """Write plain copies, which a checkpoint was loaded into, back to their parameters."""
    for copy in copies:
        copy.stands_for.copy_(copy)


def history_shards(
    chunks: Sequence[nn.Module], layout: ProcessLayout, *, length: int, prefix: str = "fp8."
) -> dict[str, TensorShard]:
    """Return the state of delayed scaling, a record of bytes for each module that has one.

    Args:
        chunks: Model chunks of this rank, without wrappers.
        layout: Where this rank is; the scales are the same on all ranks of a pipeline stage.
        length: ``fp8_amax_history_len``, on which the room for a record depends.
        prefix: Put before every key.

    Returns:
        By key: uint8, of a size that depends on the configuration alone.
    """
    first = layout.tp_rank == layout.dp_rank == layout.cp_rank == 0
    shards = {}
    for name, module in _with_history(chunks):
        data = _pack(module.get_extra_state(), size=_room(module, length), name=name)
        key = prefix + name
        shards[key] = TensorShard.whole(key, data, replica_id=0 if first else 1)
    return shards


def load_history(
    chunks: Sequence[nn.Module], shards: Mapping[str, TensorShard], *, prefix: str = "fp8."
) -> None:
    """Give modules the state that a checkpoint was loaded into *shards* of."""
    for name, module in _with_history(chunks) if shards else ():
        state = _unpack(shards[prefix + name].data)
        if state is not None:
            module.set_extra_state(state)


def _with_history(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield modules of Transformer Engine by a name that holds the layer's global number."""
    for chunk in chunks:
        modules = dict(chunk.named_modules())
        for name, module in modules.items():
            if not hasattr(module, "fp8_meta"):
                continue
            # A layer within another, as those of multi-token prediction, keeps its local number.
            match = re.match(r"(.*?\blayers)\.(\d+)(?=\.|$)", name)
            layer = modules[match[0]] if match else None
            number = getattr(layer, "layer_number", None)
            if match and number is not None:
                name = f"{match[1]}.{number - 1}{name[match.end() :]}"  # noqa: PLW2901
            yield name, module


def _room(module: Any, length: int) -> int:
    products = max(3, int(getattr(module, "num_gemms", 3)))
    return _HEADER_BYTES + _RECIPE_BYTES + _BYTES_A_STEP * length * products


def _pack(state: Any, *, size: int, name: str) -> Tensor:
    """Return *state* as *size* bytes that start with its own length."""
    if state is None:
        content = torch.empty(0, dtype=torch.uint8)
    elif isinstance(state, torch.Tensor):
        content = state.detach().to(device="cpu", dtype=torch.uint8).reshape(-1)
    else:
        content = torch.frombuffer(bytearray(state.getvalue()), dtype=torch.uint8)
    if content.numel() > size - _HEADER_BYTES:
        raise EngineError(
            f"{name}: its FP8 state has {content.numel()} bytes, more than the {size} reserved in"
            " a checkpoint; use bf16_with_fp8_current_scaling_mixed, which has no state"
        )
    packed = torch.zeros(size, dtype=torch.uint8)
    packed[:_HEADER_BYTES] = torch.tensor([content.numel()]).view(torch.uint8)
    packed[_HEADER_BYTES : _HEADER_BYTES + content.numel()] = content
    return packed


def _unpack(packed: Tensor) -> Tensor | None:
    length = int(packed[:_HEADER_BYTES].clone().view(torch.int64))
    return packed[_HEADER_BYTES : _HEADER_BYTES + length].clone() if length else None
