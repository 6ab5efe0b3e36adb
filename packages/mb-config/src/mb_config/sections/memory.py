# SPDX-License-Identifier: Apache-2.0
"""Trading time for memory: recomputation and offloading."""

from __future__ import annotations

from typing import Literal

from attrs import define

from mb_config._fields import number
from mb_config._types import check_all, checked, concise

RecomputeModule = Literal[
    "core_attn", "mla_up_proj", "moe_act", "layernorm", "mlp", "moe", "shared_experts"
]


@define(kw_only=True, on_setattr=checked)
class RecomputeConfig:
    """Recompute activations in the backward pass; names as in megatron-core.

    Attributes:
        recompute_granularity: full recomputes layers, selective the modules named below.
        recompute_method: With full: uniform splits all layers into groups, block takes the first
            layers of a stage.
        recompute_num_layers: With full: layers of a group (uniform) or of a stage (block).
        recompute_modules: With selective: what to recompute; null means core_attn.
        distribute_saved_activations: With full: share saved activations among TP ranks.
    """

    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = number(None, ge=1)
    recompute_modules: list[RecomputeModule] | None = None
    distribute_saved_activations: bool = False

    __attrs_post_init__ = check_all
    __repr__ = concise


@define(kw_only=True, on_setattr=checked)
class OffloadConfig:
    """Keep activations or optimizer states in host memory; CUDA only; names as in megatron-core.

    Attributes:
        cpu_offloading: Offload activations of some layers (TE layers).
        cpu_offloading_num_layers: How many layers; fewer than the model has.
        cpu_offloading_activations: Offload activations.
        cpu_offloading_weights: Offload weights.
        cpu_offloading_double_buffering: Keep two buffers for what comes back.
        optimizer_cpu_offload: Keep optimizer states on the host.
        optimizer_offload_fraction: Part of the states kept there.
        use_torch_optimizer_for_cpu_offload: Update them with torch's optimizer.
        overlap_cpu_optimizer_d2h_h2d: Overlap the copies with the update.
        pin_cpu_grads: Pin host gradients.
        pin_cpu_params: Pin host parameters.
    """

    cpu_offloading: bool = False
    cpu_offloading_num_layers: int = number(0, ge=0)
    cpu_offloading_activations: bool = True
    cpu_offloading_weights: bool = False
    cpu_offloading_double_buffering: bool = False
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = number(0.0, ge=0, le=1)
    use_torch_optimizer_for_cpu_offload: bool = False
    overlap_cpu_optimizer_d2h_h2d: bool = False
    pin_cpu_grads: bool = True
    pin_cpu_params: bool = True

    __attrs_post_init__ = check_all
    __repr__ = concise
