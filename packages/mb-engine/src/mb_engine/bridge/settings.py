# SPDX-License-Identifier: Apache-2.0
"""Parts of the table of settings that families share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mb_engine.bridge.errors import MappingError
from mb_engine.bridge.family import Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config import ModelConfig

_LONGEST_BY_DEFAULT = 4096
_FULL = "full_attention"
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def same(ours: str, theirs: str, default: Any = None) -> Part:
    """Return the part of a value that both say alike.

    Args:
        ours: Field of ``ModelConfig``.
        theirs: Entry of ``config.json``.
        default: What it means there if it is missing.
    """

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        value = config.get(theirs)
        value = default if value is None else value
        if value is None:
            raise MappingError(f"config.json: {theirs} is missing; get the file anew")
        return {ours: value}

    return Part(read, lambda model: {theirs: getattr(model, ours)})


def maybe(ours: str, theirs: str) -> Part:
    """Return the part of a value that both say alike and that may be null."""
    return Part(
        lambda config: {ours: config.get(theirs)}, lambda model: {theirs: getattr(model, ours)}
    )


def must(theirs: str, *values: Any) -> Part:
    """Return the part of an entry that may only have certain values, the first by default."""

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        value = config.get(theirs, values[0])
        if value not in values:
            raise MappingError(
                f"config.json: {theirs}={value!r} has no counterpart here, which has"
                f" {' or '.join(map(repr, values))}"
            )
        return {}

    return Part(read, lambda _: {})


def decoder(*, tied: bool, epsilon: float = 1e-6, head_dim: int | None = None) -> tuple[Part, ...]:
    """Return the parts that all decoders share.

    Args:
        tied: Whether embeddings are tied where ``config.json`` does not say.
        epsilon: ``rms_norm_eps`` where it does not say.
        head_dim: Width of a head where it does not say; None for the hidden size a head.
    """
    return (
        same("num_layers", "num_hidden_layers"),
        same("hidden_size", "hidden_size"),
        same("ffn_hidden_size", "intermediate_size"),
        same("vocab_size", "vocab_size"),
        same("layernorm_epsilon", "rms_norm_eps", epsilon),
        same("share_embeddings_and_output_weights", "tie_word_embeddings", tied),
        same("attention_dropout", "attention_dropout", 0.0),
        same("init_method_std", "initializer_range", 0.02),
        _heads(head_dim),
        Part(
            _read_length, lambda model: {"max_position_embeddings": model.max_position_embeddings}
        ),
    )


def _heads(head_dim: int | None) -> Part:
    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or head_dim or config["hidden_size"] // heads
        return {
            "num_attention_heads": heads,
            "num_query_groups": config.get("num_key_value_heads") or heads,
            "kv_channels": width,
        }

    def write(model: ModelConfig) -> dict[str, Any]:
        return {
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
            "head_dim": model.kv_channels or model.hidden_size // model.num_attention_heads,
        }

    return Part(read, write)


def _read_length(config: Mapping[str, Any]) -> dict[str, Any]:
    longest = config["max_position_embeddings"]
    return {
        "max_position_embeddings": longest,
        "seq_length": min(longest, _LONGEST_BY_DEFAULT),
    }


def activation(*entries: str, default: str = "silu") -> Part:
    """Return the part of the activation.

    Args:
        entries: Of ``config.json``; the first that is not null counts.
        default: What it is where all are null.
    """

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        entry, value = next(
            ((name, config[name]) for name in entries if config.get(name)), (entries[0], default)
        )
        if value not in _ACTIVATIONS:
            raise MappingError(
                f"config.json: {entry}={value!r} has no counterpart here, which has"
                f" {', '.join(_ACTIVATIONS)}"
            )
        return {"activation_func": _ACTIVATIONS[value]}

    def write(model: ModelConfig) -> dict[str, Any]:
        names = [name for name, ours in _ACTIVATIONS.items() if ours == model.activation_func]
        if not names:
            raise MappingError(f"model.activation_func={model.activation_func} has no counterpart")
        return dict.fromkeys(entries, names[0])

    return Part(read, write)


def rope(*, base: float = 10_000.0) -> Part:
    """Return the part of rotary positions.

    Args:
        base: ``rope_theta`` where it is missing.
    """

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        scaling = scaling.get(_FULL, scaling)
        theta = scaling.get("rope_theta", config.get("rope_theta", base))
        return {"rotary_base": whole(theta, "rope_theta")} | _read_scaling(scaling)

    def write(model: ModelConfig) -> dict[str, Any]:
        return {"rope_theta": float(model.rotary_base), "rope_scaling": _written_scaling(model)}

    return Part(read, write)


def whole(value: float, name: str) -> int:
    """Return *value* as an int.

    Raises:
        MappingError: If it is none.
    """
    if value != int(value):
        raise MappingError(f"config.json: {name}={value} is no whole number, as it is here")
    return int(value)


def _read_scaling(scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"rope_scaling": None}
    if kind == "linear":
        return {"rope_scaling": "linear", "rope_scaling_factor": float(scaling["factor"])}
    if kind == "llama3":
        return {
            "rope_scaling": "llama3",
            "rope_scaling_factor": float(scaling["factor"]),
            "rope_low_freq_factor": float(scaling["low_freq_factor"]),
            "rope_high_freq_factor": float(scaling["high_freq_factor"]),
            "rope_original_max_positions": int(scaling["original_max_position_embeddings"]),
        }
    raise MappingError(
        f"config.json: rope_scaling of type {kind!r} has no counterpart here, which has default,"
        " linear and llama3"
    )


def _written_scaling(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling is None:
        return None
    scaling = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
    if model.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_max_positions,
        }
    return scaling


def biases(entry: str = "attention_bias", *, mlp: str | None = None) -> Part:
    """Return the part of biases in all linears of attention, and of the MLP.

    Args:
        entry: Of attention's linears, all four.
        mlp: Of the MLP's linears, or None where they never have one.
    """

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        attention = bool(config.get(entry, False))
        both = bool(mlp and config.get(mlp, False))
        if both and not attention:
            raise MappingError(
                f"config.json: {mlp} without {entry} has no counterpart here: biases are in"
                " attention, or in attention and MLP"
            )
        alone = attention and not both
        return {
            "add_bias_linear": both,
            "add_qkv_bias": alone,
            "attention_output_bias": alone,
        }

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.add_qkv_bias != model.attention_output_bias and not model.add_bias_linear:
            raise MappingError("biases of queries, keys and values alone have no counterpart")
        written = {entry: model.add_bias_linear or model.add_qkv_bias}
        return written | ({mlp: model.add_bias_linear} if mlp else {})

    return Part(read, write)


def softmax_scale(entry: str = "query_pre_attn_scalar", *, default: int = 256) -> Part:
    """Return the part of a scale of attention scores, given as what its root is divided by."""

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        return {"megatron": {"softmax_scale": config.get(entry, default) ** -0.5}}

    def write(model: ModelConfig) -> dict[str, Any]:
        width = model.kv_channels or model.hidden_size // model.num_attention_heads
        scale = model.megatron.get("softmax_scale", width**-0.5)
        value = round(scale**-2, 6)
        return {entry: int(value) if value == int(value) else value}

    return Part(read, write)


def embedding_scale() -> Part:
    """Return the part of embeddings that are multiplied by the root of the hidden size."""

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.embedding_scale != model.hidden_size**0.5:
            raise MappingError(
                f"model.embedding_scale={model.embedding_scale}: the family has the root of"
                " hidden_size"
            )
        return {}

    return Part(lambda config: {"embedding_scale": config["hidden_size"] ** 0.5}, write)
