# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies of longer sequences, and of layers that have their own.

Shape suffixes: S = tokens of a sequence, D = rotated width of a head.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from megatron.core.transformer.utils import is_layer_window_attention

if TYPE_CHECKING:
    from mb_config import ModelConfig
    from torch import Tensor


def stretch_rotary(chunk: Any, model: ModelConfig) -> None:
    """Divide the rotary frequencies of *chunk* as ``model.rope_scaling`` says.

    Args:
        chunk: A GPT model that has computed no angles yet.
        model: The model section.
    """
    rotary = getattr(chunk, "rotary_pos_emb", None)
    if model.rope_scaling is not None and rotary is not None:
        rotary.inv_freq = stretched(rotary.inv_freq, model)


def stretched(frequencies: Tensor, model: ModelConfig) -> Tensor:
    """Return *frequencies*, radians a token, as ``model.rope_scaling`` says; same shape.

    ``linear`` divides all by the factor. ``llama3`` divides those that turn less than
    ``rope_low_freq_factor`` times within the first length, keeps those that turn more than
    ``rope_high_freq_factor`` times, and goes from one to the other between.

    Source: Chen et al. 2023, arXiv:2306.15595 (linear); Llama 3.1's reference code (llama3).
    """
    factor = model.rope_scaling_factor
    if model.rope_scaling == "linear":
        return frequencies / factor
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    turns = model.rope_original_max_positions * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


@frozen(eq=False)
class LocalRotary:
    """Angles with frequencies of a layer's own.

    Attributes:
        base: Of the frequencies.
        position_of: What the first angle of a position is multiplied with to have the position.
    """

    base: int
    position_of: float

    def angles(self, angles_S11D: Tensor) -> Tensor:
        """Return the angles of the same positions with these frequencies, same shape.

        Args:
            angles_S11D: Of the other layers; both halves of D are equal. The first frequency of
                any base is 1, so that the positions can be read off, whatever part of a sequence
                a context-parallel rank has.
        """
        return _angles(angles_S11D, self.base, self.position_of)


def local_rotary_of(config: Any, layer_number: int) -> LocalRotary | None:
    """Return the frequencies of a layer with a window, or None if they are those of all layers.

    Args:
        config: Megatron-core's ``TransformerConfig``.
        layer_number: From 1.
    """
    base = config.rotary_base_local
    if base is None or not is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    ):
        return None
    scale = config.rope_scaling_factor if config.rope_scaling == "linear" else 1.0
    return LocalRotary(base, scale)


@functools.lru_cache(maxsize=4)
def _angles(angles_S11D: Tensor, base: int, position_of: float) -> Tensor:
    width = angles_S11D.size(-1)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=angles_S11D.device) / width
    positions_S11 = (angles_S11D[..., 0].float() * position_of).round()
    half = positions_S11.unsqueeze(-1) * (1.0 / base**exponents)
    return torch.cat((half, half), dim=-1).to(angles_S11D.dtype)
