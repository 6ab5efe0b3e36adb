# SPDX-License-Identifier: Apache-2.0
"""Qwen3, dense: queries and keys are normalized."""

from __future__ import annotations

from mb_engine.bridge import decoder_rules, settings, windows
from mb_engine.bridge.family import Family

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    rules=decoder_rules.DENSE,
    parts=(
        *settings.decoder(tied=False, head_dim=128),
        settings.activation("hidden_act"),
        settings.rope(),
        settings.biases(),
        windows.above_a_layer(),
    ),
    fixed={"qk_layernorm": True},
)
