# SPDX-License-Identifier: Apache-2.0
"""Mistral 7B and its successors: Llama with a sliding window."""

from __future__ import annotations

from mb_engine.bridge import decoder_rules, settings, windows
from mb_engine.bridge.family import Family

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    rules=decoder_rules.DENSE,
    parts=(
        *settings.decoder(tied=False),
        settings.activation("hidden_act"),
        settings.rope(),
        windows.in_every_layer(),
    ),
    fixed={},
)
