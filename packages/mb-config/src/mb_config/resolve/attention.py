# SPDX-License-Identifier: Apache-2.0
"""Windows, capped scores, and how context-parallel ranks exchange keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft

_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_ONLY_TORCH = ("rotary_base_local", "normalize_branch_outputs", "attention_output_bias")


def resolve(draft: Draft) -> None:
    """Choose the exchange of context parallelism and refuse what no kernel computes."""
    _window(draft)
    _caps(draft)
    _rotary(draft)
    _torch_layers(draft)
    if draft.config.model.context_parallel_size > 1:
        _exchange(draft)


def choose_layers(draft: Draft) -> None:
    """Take the torch layers where only they have what the model asks for.

    Comes before what asks which layers there are.
    """
    model = draft.config.model
    needing = [name for name in (*_CAPS, *_ONLY_TORCH) if getattr(model, name)]
    if needing and model.layer_spec == "auto":
        draft.derive("model.layer_spec", "torch", ", ".join(needing))


def _window(draft: Draft) -> None:
    model = draft.config.model
    frequency = model.window_attn_skip_freq
    if frequency is None:
        return
    draft.require(
        model.window_size is not None,
        "model.window_attn_skip_freq",
        "says which layers do without the window, and there is none",
        "set model.window_size, or leave it out",
    )
    if isinstance(frequency, list):
        draft.require(
            len(frequency) == model.num_layers and set(frequency) <= {0, 1},
            "model.window_attn_skip_freq",
            f"a list must have a 0 or 1 for each of the {model.num_layers} layers",
            "give one number for all",
        )
    else:
        draft.require(
            frequency > 0,
            "model.window_attn_skip_freq",
            "must be at least 1, which leaves no layer with a window",
            "leave it out for a window in every layer",
        )


def _caps(draft: Draft) -> None:
    model = draft.config.model
    for name in _CAPS:
        draft.require(
            getattr(model, name) is None or model.layer_spec != "te",
            f"model.{name}",
            "Transformer Engine's layers do not cap logits",
            "set model.layer_spec=torch or auto",
        )
    draft.require(
        model.attn_logit_softcapping is None or model.attention_dropout == 0,
        "model.attn_logit_softcapping",
        f"no kernel drops capped scores, here attention_dropout={model.attention_dropout}",
        "set model.attention_dropout=0",
    )


def _rotary(draft: Draft) -> None:
    model = draft.config.model
    plain = model.position_embedding_type == "rope" and not model.multi_latent_attention
    for name in ("rope_scaling", "rotary_base_local"):
        draft.require(
            getattr(model, name) is None or plain,
            f"model.{name}",
            "is for rotary positions outside of multi_latent_attention",
            "leave it out",
        )
    draft.require(
        model.rotary_base_local is None or model.window_size is not None,
        "model.rotary_base_local",
        "is for layers with a window, and there is none",
        "set model.window_size, or leave it out",
    )
    draft.require(
        model.rope_scaling != "llama3" or model.rope_high_freq_factor > model.rope_low_freq_factor,
        "model.rope_high_freq_factor",
        f"must be greater than rope_low_freq_factor={model.rope_low_freq_factor}",
        "raise it",
    )


def _torch_layers(draft: Draft) -> None:
    model = draft.config.model
    for name in _ONLY_TORCH:
        draft.require(
            not getattr(model, name) or model.layer_spec != "te",
            f"model.{name}",
            "Transformer Engine's layers do not have it",
            "set model.layer_spec=torch or auto",
        )
    for name in ("normalize_branch_outputs", "attention_output_bias"):
        draft.require(
            not (getattr(model, name) and model.multi_latent_attention),
            f"model.{name}",
            "multi_latent_attention does not have it",
            "leave it out",
        )
    draft.require(
        not (model.normalize_branch_outputs and model.num_moe_experts),
        "model.normalize_branch_outputs",
        f"is for dense layers, here num_moe_experts={model.num_moe_experts}",
        "leave it out",
    )


def _exchange(draft: Draft) -> None:
    model = draft.config.model
    windowed, dropped = model.window_size is not None, model.attention_dropout > 0
    kinds = model.cp_comm_type
    given = kinds if isinstance(kinds, list) else [kinds] if kinds else []
    draft.require(
        not (windowed and {"p2p", "a2a+p2p"} & set(given)),
        "model.cp_comm_type",
        f"a ring has no kernel for window_size={model.window_size}",
        "use all_gather or a2a, or leave it out",
    )
    draft.require(
        not (dropped and "p2p" in given and model.layer_spec == "torch"),
        "model.cp_comm_type",
        f"a ring of the torch layers does not drop, here attention_dropout="
        f"{model.attention_dropout}",
        "use all_gather or a2a, or leave it out",
    )
    draft.require(
        "a2a+p2p" not in given or model.layer_spec != "torch",
        "model.cp_comm_type",
        "the torch layers exchange by p2p, all_gather or a2a",
        "use one of these, or model.layer_spec=te",
    )
    why = "the least memory: keys and values pass from rank to rank"
    if windowed:
        why = f"a ring has no kernel for window_size={model.window_size}"
    elif dropped:
        why = f"a ring does not drop, attention_dropout={model.attention_dropout}"
    draft.fill("model.cp_comm_type", "all_gather" if windowed or dropped else "p2p", why)
