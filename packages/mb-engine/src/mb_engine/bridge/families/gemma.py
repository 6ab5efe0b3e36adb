# SPDX-License-Identifier: Apache-2.0
"""Gemma 1: norms store their offset from 1, embeddings are scaled and tied."""

from __future__ import annotations

from mb_engine.bridge import decoder_rules, settings
from mb_engine.bridge.family import Family

FAMILY = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    model_type="gemma",
    rules=decoder_rules.DENSE,
    parts=(
        *settings.decoder(tied=True, head_dim=256),
        settings.activation("hidden_act", default="gelu_pytorch_tanh"),
        settings.rope(),
        settings.biases(),
        settings.embedding_scale(),
    ),
    fixed={"layernorm_zero_centered_gamma": True},
)
