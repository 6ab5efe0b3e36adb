# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs of each pipeline stage, from the counts of :mod:`mb_engine.model.flops`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from mb_config.pipeline import stage_chunks

from mb_engine.model.flops import flops_per_token, forward_flops_per_token
from mb_engine.plan.layout import expert_layers

if TYPE_CHECKING:
    from mb_config import ConfigContainer
    from mb_config.sections.model import ModelConfig


def flops_per_step(config: ConfigContainer) -> float:
    """Return the model FLOPs of one step over all ranks, forward and backward."""
    tokens = (config.train.global_batch_size or 0) * config.model.seq_length
    return flops_per_token(config) * tokens


def forward_flops_by_stage(model: ModelConfig) -> list[float]:
    """Return the forward operations of one token in each pipeline stage.

    Args:
        model: Resolved.
    """
    output = forward_flops_per_token(_with_layers(model, []))
    kinds = expert_layers(model)
    by_kind = {
        kind: forward_flops_per_token(_with_layers(model, [kind])) - output for kind in set(kinds)
    }
    ahead = 0.0
    if model.mtp_num_layers:
        whole = forward_flops_per_token(_with_layers(model, [kinds[-1]], ahead=1))
        ahead = whole - forward_flops_per_token(_with_layers(model, [kinds[-1]]))
    stages = []
    for chunks in stage_chunks(model):
        total = 0.0
        for held in chunks:
            total += sum(by_kind[kinds[index]] for index in held.layers)
            total += held.mtp * ahead
            if held.loss:
                total += output
        stages.append(total)
    return stages


def _with_layers(model: ModelConfig, kinds: list[bool], *, ahead: int = 0) -> ModelConfig:
    """Return *model* with these layers alone, the output layer, and *ahead* predictions ahead."""
    changed = copy.copy(model)
    changed.moe_layer_freq = [int(kind) for kind in kinds]
    changed.num_layers = len(kinds)
    changed.mtp_num_layers = ahead or None
    changed.cp_comm_type = changed.window_attn_skip_freq = None
    return changed
