# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: Llama with a bias of queries, keys and values."""

from __future__ import annotations

from mb_engine.bridge import decoder_rules, settings, windows
from mb_engine.bridge.family import Family

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    rules=decoder_rules.DENSE,
    parts=(
        *settings.decoder(tied=False),
        settings.activation("hidden_act"),
        settings.rope(),
        windows.above_a_layer(),
    ),
    fixed={"add_qkv_bias": True},
)
