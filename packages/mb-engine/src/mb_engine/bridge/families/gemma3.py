# SPDX-License-Identifier: Apache-2.0
"""Gemma 3, text: five layers with a window and rotary base of their own to one without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mb_engine.bridge import decoder_rules, settings, windows
from mb_engine.bridge.family import Family, Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config import ModelConfig

_LOCAL_BASE = 10_000.0


def _read_local_base(config: Mapping[str, Any]) -> dict[str, Any]:
    by_kind = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    base = by_kind.get("rope_theta", config.get("rope_local_base_freq", _LOCAL_BASE))
    return {"rotary_base_local": settings.whole(base, "rope_local_base_freq")}


def _write_local_base(model: ModelConfig) -> dict[str, Any]:
    return {"rope_local_base_freq": float(model.rotary_base_local or model.rotary_base)}


FAMILY = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    rules=(
        *decoder_rules.ENDS,
        *decoder_rules.ATTENTION,
        *decoder_rules.AROUND_BRANCHES,
        *decoder_rules.MLP,
    ),
    parts=(
        *settings.decoder(tied=True, head_dim=256),
        settings.activation("hidden_activation", default="gelu_pytorch_tanh"),
        settings.rope(base=1e6),
        Part(_read_local_base, _write_local_base),
        settings.biases(),
        settings.embedding_scale(),
        settings.softmax_scale(),
        windows.alternating(every=6, window=4096),
        settings.maybe("attn_logit_softcapping", "attn_logit_softcapping"),
        settings.maybe("final_logit_softcapping", "final_logit_softcapping"),
        settings.must("use_bidirectional_attention", False),
    ),
    fixed={
        "layernorm_zero_centered_gamma": True,
        "normalize_branch_outputs": True,
        "qk_layernorm": True,
    },
)
