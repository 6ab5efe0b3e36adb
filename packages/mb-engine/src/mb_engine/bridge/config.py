# SPDX-License-Identifier: Apache-2.0
"""Configurations from a Hugging Face folder, and ``config.json`` from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mb_config import ConfigContainer, ModelConfig

from mb_engine.bridge.errors import BridgeError, MappingError
from mb_engine.bridge.family import Family, families, family
from mb_engine.bridge.source import read_config

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "vocab_size",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_base_local",
    "rope_scaling",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
    "normalize_branch_outputs",
    "embedding_scale",
    "activation_func",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "attention_output_bias",
    "share_embeddings_and_output_weights",
    "apply_residual_connection_post_layernorm",
    "window_size",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_num_groups",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "multi_latent_attention",
    "mtp_num_layers",
)
"""Fields that decide what a model computes, and which a ``config.json`` must agree on."""

_STRETCHED = (
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_positions",
)
_PRECISIONS = {"bfloat16": "bf16_mixed", "float16": "fp16_mixed"}


def config_from_hf(folder: str | os.PathLike[str]) -> ConfigContainer:
    """Return a configuration with the model, tokenizer and weights of *folder*.

    ``model.seq_length`` is the longest of the model, at most 4096; the precision is bf16_mixed or
    fp16_mixed where the folder says so. What to train on is left to be set.

    Args:
        folder: With ``config.json``; weights are not read.

    Raises:
        HubFormatError: If ``config.json`` is missing or damaged.
        UnknownFamilyError: If there is no mapping for its architecture.
        MappingError: If it asks for something that our model does not have.
    """
    folder = Path(folder)
    config, chosen = read_config(folder)
    container = ConfigContainer(model=model_from_hf(config, chosen, where=folder / "config.json"))
    container.mixed_precision = _PRECISIONS.get(str(config.get("dtype", config.get("torch_dtype"))))
    container.tokenizer.tokenizer_type = "huggingface"
    container.tokenizer.tokenizer_model = str(folder)
    container.checkpoint.pretrained_checkpoint = str(folder)
    return container


def model_from_hf(config: Mapping[str, Any], chosen: Family, *, where: object) -> ModelConfig:
    """Return the model section of a ``config.json``.

    Raises:
        MappingError: If it asks for something that our model does not have, or lacks an entry.
    """
    try:
        return ModelConfig(**chosen.read_config(config))
    except KeyError as error:
        raise MappingError(f"{where}: {error.args[0]} is missing; get the file anew") from error
    except MappingError as error:
        raise MappingError(f"{where}: {error}".replace("config.json: ", "", 1)) from error


def config_to_hf(model: ModelConfig, *, name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """Return the family that has *model*, and its ``config.json``.

    Args:
        model: A resolved model section.
        name: Of the family; None finds one.

    Raises:
        MappingError: If the family, or no family, has such a model; says what stands against it.
    """
    reasons = []
    for candidate in [name] if name else families():
        chosen = family(candidate)
        try:
            written = chosen.write_config(model)
            again = model_from_hf(written, chosen, where=candidate)
        except BridgeError as error:
            reasons.append(f"{candidate}: {error}")
            continue
        differences = mismatches(model, again)
        if not differences:
            # The caches of transformers' generation are on by default; so is its dtype float32.
            return chosen, written | {"dtype": model.params_dtype or "float32", "use_cache": True}
        reasons.append(f"{candidate}: cannot say {', '.join(differences)}")
    raise MappingError(f"no config.json says what this model is; {'; '.join(reasons)}")


def mismatches(mine: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Return the fields in which two models differ in what they compute, as ``field=a, not b``."""
    names = ARCHITECTURE + (_STRETCHED if mine.rope_scaling == "llama3" else ())
    names += _STRETCHED[:1] if mine.rope_scaling == "linear" else ()
    pairs = {name: (_effective(mine, name), _effective(theirs, name)) for name in names}
    for name, value in (
        ("window_attn_skip_freq", _windows),
        ("moe_layer_freq", _layers_with_experts),
        ("megatron.softmax_scale", _softmax_scale),
    ):
        pairs[name] = (value(mine), value(theirs))
    return [f"model.{name}={a!r}, not {b!r}" for name, (a, b) in pairs.items() if a != b]


def _effective(model: ModelConfig, name: str) -> Any:
    """Return the value of a field with what finalize would derive for null."""
    value = getattr(model, name)
    if name == "num_query_groups":
        return value or model.num_attention_heads
    if name == "kv_channels":
        return value or model.hidden_size // max(1, model.num_attention_heads)
    if name in {"moe_ffn_hidden_size", "moe_router_topk"} and model.num_moe_experts is None:
        return None
    if name == "moe_ffn_hidden_size":
        return value or model.ffn_hidden_size
    if name == "ffn_hidden_size" and all(_layers_with_experts(model) or [False]):
        return None  # of dense layers, and there are none
    return value


def _windows(model: ModelConfig) -> list[str] | None:
    from mb_engine.bridge.windows import layer_types

    return layer_types(model) if model.window_size is not None else None


def _layers_with_experts(model: ModelConfig) -> list[bool]:
    from mb_engine.bridge.mapping import expert_layers

    return expert_layers(model)


def _softmax_scale(model: ModelConfig) -> float:
    width = model.kv_channels or model.hidden_size // max(1, model.num_attention_heads)
    return round(float(model.megatron.get("softmax_scale", width**-0.5)), 12)
