# SPDX-License-Identifier: Apache-2.0
"""Llama 2, 3, 3.1, 3.2 and 3.3, and the many models of that architecture."""

from __future__ import annotations

from mb_engine.bridge import decoder_rules, settings
from mb_engine.bridge.family import Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    rules=decoder_rules.DENSE,
    parts=(
        *settings.decoder(tied=False),
        settings.activation("hidden_act"),
        settings.rope(),
        settings.biases(mlp="mlp_bias"),
    ),
    fixed={},
)
