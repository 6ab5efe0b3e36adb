# SPDX-License-Identifier: Apache-2.0
"""Mixtral 8x7B and 8x22B: Mistral with experts in every layer."""

from __future__ import annotations

from mb_engine.bridge import decoder_rules, settings, windows
from mb_engine.bridge.family import Family

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    rules=(
        *decoder_rules.ENDS,
        *decoder_rules.ATTENTION,
        *decoder_rules.experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    parts=(
        *settings.decoder(tied=False, epsilon=1e-5),
        settings.activation("hidden_act"),
        settings.rope(base=1e6),
        windows.in_every_layer(),
        settings.same("num_moe_experts", "num_local_experts", 8),
        settings.same("moe_router_topk", "num_experts_per_tok", 2),
        settings.same("moe_aux_loss_coeff", "router_aux_loss_coef", 0.001),
    ),
    fixed={"moe_router_pre_softmax": False},
)
