# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE: experts, with dense layers among them where the configuration says so."""

from __future__ import annotations

from mb_engine.bridge import decoder_rules, expert_settings, settings, windows
from mb_engine.bridge.family import Family

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rules=(*decoder_rules.DENSE, *decoder_rules.experts()),
    parts=(
        *settings.decoder(tied=False),
        settings.activation("hidden_act"),
        settings.rope(),
        settings.biases(),
        windows.above_a_layer(),
        settings.same("num_moe_experts", "num_experts", 128),
        settings.same("moe_router_topk", "num_experts_per_tok", 8),
        settings.same("moe_ffn_hidden_size", "moe_intermediate_size", 768),
        settings.same("moe_aux_loss_coeff", "router_aux_loss_coef", 0.001),
        expert_settings.routing(normalized=False),
        expert_settings.which_layers(),
    ),
    fixed={"qk_layernorm": True},
)
