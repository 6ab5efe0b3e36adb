# SPDX-License-Identifier: Apache-2.0
"""Qwen1.5-MoE and Qwen2-MoE: experts, and one more with a gate for every token."""

from __future__ import annotations

from mb_engine.bridge import decoder_rules, expert_settings, settings, windows
from mb_engine.bridge.family import Family

FAMILY = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    rules=(
        *decoder_rules.DENSE,
        *decoder_rules.experts(),
        *decoder_rules.SHARED_EXPERT,
    ),
    parts=(
        *settings.decoder(tied=False),
        settings.activation("hidden_act"),
        settings.rope(),
        windows.above_a_layer(),
        settings.must("qkv_bias", True),
        settings.same("num_moe_experts", "num_experts", 60),
        settings.same("moe_router_topk", "num_experts_per_tok", 4),
        settings.same("moe_ffn_hidden_size", "moe_intermediate_size", 1408),
        settings.same(
            "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", 5632
        ),
        settings.same("moe_aux_loss_coeff", "router_aux_loss_coef", 0.001),
        expert_settings.routing(normalized=False),
        expert_settings.which_layers(),
    ),
    fixed={"add_qkv_bias": True, "moe_shared_expert_gate": True},
)
