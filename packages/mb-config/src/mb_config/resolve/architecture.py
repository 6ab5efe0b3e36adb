# SPDX-License-Identifier: Apache-2.0
"""Sizes of the model that follow from others, and what must divide what."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from mb_config._types import show
from mb_config.errors import Violation

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft


def resolve(draft: Draft) -> None:
    """Derive heads, widths and vocabulary and check them."""
    model = draft.config.model
    given = [
        draft.require(
            getattr(model, name) > 0,
            f"model.{name}",
            "must be set, to at least 1",
            f"give model.{name}",
        )
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
    ]
    if all(given):
        _attention(draft)
        _mlp(draft)
        _positions(draft)
        _multi_token(draft)
    _vocabulary(draft)
    _kernels(draft)
    _pass_through(draft)


def _attention(draft: Draft) -> None:
    model = draft.config.model
    heads, tp = model.num_attention_heads, model.tensor_model_parallel_size
    draft.require(
        heads % tp == 0,
        "model.num_attention_heads",
        f"must be a multiple of tensor_model_parallel_size={tp}",
        f"use {-(-heads // tp) * tp} heads, or lower model.tensor_model_parallel_size",
    )
    draft.fill("model.num_query_groups", heads, "num_attention_heads")
    groups = model.num_query_groups
    assert groups is not None
    draft.require(
        heads % groups == 0,
        "model.num_query_groups",
        f"must divide num_attention_heads={heads}",
        "choose a divisor",
    )
    draft.require(
        groups % tp == 0 or tp % groups == 0,
        "model.num_query_groups",
        f"must be a multiple or a divisor of tensor_model_parallel_size={tp}",
        "change one of them",
    )
    if model.multi_latent_attention:
        _latent_attention(draft)
        return
    draft.require(
        model.q_lora_rank is None,
        "model.q_lora_rank",
        "needs multi_latent_attention",
        "set model.multi_latent_attention=true, or leave it out",
    )
    if model.kv_channels is not None:
        return
    if draft.require(
        model.hidden_size % heads == 0,
        "model.hidden_size",
        f"must be a multiple of num_attention_heads={heads}",
        f"use {-(-model.hidden_size // heads) * heads}, or set model.kv_channels",
    ):
        why = f"hidden_size {model.hidden_size} / num_attention_heads {heads}"
        draft.derive("model.kv_channels", model.hidden_size // heads, why)


def _latent_attention(draft: Draft) -> None:
    model = draft.config.model
    width = model.qk_head_dim + model.qk_pos_emb_head_dim
    why = f"qk_head_dim {model.qk_head_dim} + qk_pos_emb_head_dim {model.qk_pos_emb_head_dim}"
    draft.fix("model.kv_channels", width, why)
    draft.require(
        model.num_query_groups == model.num_attention_heads,
        "model.num_query_groups",
        "multi_latent_attention has a key and a value for each head",
        "leave it out",
    )
    draft.require(
        model.qk_pos_emb_head_dim % 2 == 0,
        "model.qk_pos_emb_head_dim",
        "rope turns pairs: it must be even",
        "choose an even width",
    )
    draft.require(
        model.position_embedding_type == "rope" and model.rotary_percent == 1,
        "model.position_embedding_type",
        "multi_latent_attention has rotary positions, in all of qk_pos_emb_head_dim",
        "set model.position_embedding_type=rope and model.rotary_percent=1",
    )
    draft.require(
        not model.add_qkv_bias,
        "model.add_qkv_bias",
        "the projections of multi_latent_attention have no bias",
        "set it to false",
    )
    draft.require(
        model.tensor_model_parallel_size == 1 or model.sequence_parallel,
        "model.sequence_parallel",
        "multi_latent_attention with tensor parallelism needs it for the gradients of what ranks"
        " share",
        "set model.sequence_parallel=true",
    )


def _multi_token(draft: Draft) -> None:
    model, recompute = draft.config.model, draft.config.recompute
    if model.mtp_num_layers is None:
        return
    draft.require(
        model.position_embedding_type != "learned_absolute",
        "model.mtp_num_layers",
        "predictions ahead do not go with learned positions",
        "use model.position_embedding_type=rope",
    )
    draft.require(
        not isinstance(model.window_attn_skip_freq, list),
        "model.mtp_num_layers",
        "layers that predict ahead have no place in a list of layers with a window",
        "give model.window_attn_skip_freq as a number",
    )
    draft.require(
        not model.share_embeddings_and_output_weights or model.pipeline_model_parallel_size == 1,
        "model.mtp_num_layers",
        "with pipeline stages it does not go with share_embeddings_and_output_weights:"
        " megatron-core keeps an output weight there that nothing trains",
        "set one of them to its default",
    )
    draft.require(
        recompute.recompute_granularity != "full"
        or (recompute.recompute_method == "uniform" and recompute.recompute_num_layers == 1),
        "model.mtp_num_layers",
        "predictions ahead are recomputed one layer at a time",
        "set recompute.recompute_method=uniform and recompute.recompute_num_layers=1",
    )


def _mlp(draft: Draft) -> None:
    model = draft.config.model
    hidden, tp = model.hidden_size, model.tensor_model_parallel_size
    if model.gated_linear_unit:
        width, why = max(64, 8 * hidden // 3 // 64 * 64), f"8/3 x hidden_size {hidden}, by 64s"
    else:
        width, why = 4 * hidden, f"4 x hidden_size {hidden}"
    draft.fill("model.ffn_hidden_size", width, why)
    assert model.ffn_hidden_size is not None
    draft.require(
        model.ffn_hidden_size % tp == 0,
        "model.ffn_hidden_size",
        f"must be a multiple of tensor_model_parallel_size={tp}",
        f"use {-(-model.ffn_hidden_size // tp) * tp}",
    )
    draft.require(
        hidden % tp == 0,
        "model.hidden_size",
        f"must be a multiple of tensor_model_parallel_size={tp}",
        f"use {-(-hidden // tp) * tp}",
    )


def _positions(draft: Draft) -> None:
    model = draft.config.model
    draft.fill("model.max_position_embeddings", model.seq_length, "seq_length")
    assert model.max_position_embeddings is not None
    draft.require(
        model.max_position_embeddings >= model.seq_length,
        "model.max_position_embeddings",
        f"must be at least seq_length={model.seq_length}",
        "raise it, or leave it out",
    )
    latent = model.multi_latent_attention  # rotates a part of its own
    if model.position_embedding_type != "rope" or model.kv_channels is None or latent:
        return
    rotated = model.kv_channels * model.rotary_percent
    name = "kv_channels" if model.rotary_percent == 1 else "rotary_percent"
    draft.require(
        rotated == int(rotated) and int(rotated) % 2 == 0,
        f"model.{name}",
        f"rope turns pairs: kv_channels {model.kv_channels} x rotary_percent"
        f" {model.rotary_percent} = {rotated:g} must be even",
        "choose an even width of a head",
    )


def _vocabulary(draft: Draft) -> None:
    model, tokenizer = draft.config.model, draft.config.tokenizer
    null = tokenizer.tokenizer_type == "null"
    draft.require(
        not null or tokenizer.vocab_size is not None,
        "tokenizer.vocab_size",
        "a null tokenizer needs the number of its tokens",
        "give tokenizer.vocab_size",
    )
    draft.require(
        null or tokenizer.vocab_size is None,
        "tokenizer.vocab_size",
        f"only a null tokenizer is told it, this one is {tokenizer.tokenizer_type}",
        "leave it out",
    )
    draft.require(
        tokenizer.tokenizer_type != "huggingface" or tokenizer.tokenizer_model,
        "tokenizer.tokenizer_model",
        "a huggingface tokenizer needs its folder or file",
        "give tokenizer.tokenizer_model",
    )
    if null and tokenizer.vocab_size is not None:
        draft.fill("model.vocab_size", tokenizer.vocab_size, "tokenizer.vocab_size")
        draft.require(
            (model.vocab_size or 0) >= tokenizer.vocab_size,
            "model.vocab_size",
            f"must hold the tokenizer's {tokenizer.vocab_size} tokens",
            "leave it out",
        )
    if model.vocab_size is None:
        return
    by, tp = model.make_vocab_size_divisible_by, model.tensor_model_parallel_size
    multiple = math.lcm(by, tp)
    draft.fix(
        "model.padded_vocab_size",
        -(-model.vocab_size // multiple) * multiple,
        f"vocab_size {model.vocab_size} up to a multiple of lcm(make_vocab_size_divisible_by {by},"
        f" TP {tp}) = {multiple}",
    )


def _kernels(draft: Draft) -> None:
    model = draft.config.model
    draft.require(
        model.cross_entropy_fusion_impl == "native" or model.cross_entropy_loss_fusion,
        "model.cross_entropy_fusion_impl",
        "needs cross_entropy_loss_fusion",
        "set model.cross_entropy_loss_fusion=true, or leave it out",
    )
    draft.require(
        not (model.deterministic_mode and model.cross_entropy_loss_fusion),
        "model.cross_entropy_loss_fusion",
        "is not deterministic",
        "set it to false, or model.deterministic_mode=false",
    )
    draft.require(
        not model.bias_activation_fusion or model.activation_func in ("gelu", "silu"),
        "model.bias_activation_fusion",
        "goes with gelu and silu alone",
        "set it to false, or change model.activation_func",
    )
    draft.require(
        not model.bias_activation_fusion
        or model.gated_linear_unit
        or model.add_bias_linear
        or model.activation_func != "gelu",
        "model.bias_activation_fusion",
        "an ungated gelu needs a bias to fuse",
        "set it to false, or model.add_bias_linear=true",
    )


def _pass_through(draft: Draft) -> None:
    """Refuse entries of ``model.megatron`` that would go round a field of ours."""
    config = draft.config
    own = {
        field.name: section
        for section in ("model", "comm_overlap", "recompute", "offload", "cuda_graph")
        for field in attrs.fields(type(getattr(config, section)))
    }
    for name, value in config.model.megatron.items():
        if name in own:
            draft.violations.append(
                Violation(
                    field=f"model.megatron.{name}",
                    value=show(value),
                    rule=f"{own[name]} has a field of its own for this",
                    remedy=f"set {own[name]}.{name}",
                )
            )
