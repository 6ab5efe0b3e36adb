# SPDX-License-Identifier: Apache-2.0
"""Gemma 2: windows in every other layer, capped logits, norms on both sides of a branch."""

from __future__ import annotations

from mb_engine.bridge import decoder_rules, settings, windows
from mb_engine.bridge.family import Family

FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    rules=(
        *decoder_rules.ENDS,
        *decoder_rules.ATTENTION,
        *decoder_rules.AROUND_BRANCHES,
        *decoder_rules.MLP,
    ),
    parts=(
        *settings.decoder(tied=True, head_dim=256),
        settings.activation("hidden_activation", default="gelu_pytorch_tanh"),
        settings.rope(),
        settings.biases(),
        settings.embedding_scale(),
        settings.softmax_scale(),
        windows.alternating(every=2, window=4096),
        settings.maybe("attn_logit_softcapping", "attn_logit_softcapping"),
        settings.maybe("final_logit_softcapping", "final_logit_softcapping"),
    ),
    fixed={"layernorm_zero_centered_gamma": True, "normalize_branch_outputs": True},
)
