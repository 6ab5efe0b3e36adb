# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of one token, for TFLOP/s and model FLOPs utilization.

Counted are the matrix products, a multiplication and an addition as two operations; norms,
activations, softmax and the embedding lookup are not. The backward pass is twice the forward pass.
Recomputed activations are not counted: these are the model's operations, not the machine's.

Attention is counted *causally*: a query is multiplied with the keys it sees, on average
``(S + 1) / 2`` of S, or fewer with a sliding window or where samples are packed into the row. (The
appendix of PaLM counts all S.)

Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; Narayanan et al. 2021,
arXiv:2104.04473, appendix, extended to grouped queries, gated MLPs, experts, latent attention
(arXiv:2405.04434, eq. 9 to 19) and predictions ahead (arXiv:2412.19437, eq. 21 to 23).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_config import ConfigContainer
    from mb_config.sections.model import ModelConfig

_FORWARD_AND_BACKWARD = 3.0
_MULTIPLY_AND_ADD = 2.0


def flops_per_token(config: ConfigContainer, lengths: Sequence[int] | None = None) -> float:
    """Return the operations of forward and backward of one token, averaged over a row.

    Args:
        config: Resolved, so that no size is None.
        lengths: Tokens of each of the samples packed into a row (the differences of
            ``cu_seqlens``); None for one sample of ``seq_length``.
    """
    return _FORWARD_AND_BACKWARD * forward_flops_per_token(config.model, lengths)


def forward_flops_per_token(model: ModelConfig, lengths: Sequence[int] | None = None) -> float:
    """Return the operations of the forward pass of one token, averaged over a row.

    Args:
        model: The resolved ``model`` section.
        lengths: As :func:`flops_per_token`.
    """
    experts = _moe_pattern(model)
    output = float(model.hidden_size * (model.padded_vocab_size or 0))
    products = output
    for layer in range(model.num_layers):
        products += _layer_products(model, layer, has_experts=experts[layer], lengths=lengths)
    for ahead in range(model.mtp_num_layers or 0):
        products += 2 * model.hidden_size * model.hidden_size + output
        products += _layer_products(
            model, model.num_layers + ahead, has_experts=sum(experts[-1:]), lengths=lengths
        )
    return _MULTIPLY_AND_ADD * products


def visible_keys_per_query(
    model: ModelConfig, lengths: Sequence[int] | None = None, *, layer: int | None = None
) -> float:
    """Return how many keys a query sees, averaged over a row, causal and within the window.

    Args:
        model: The resolved ``model`` section.
        lengths: As :func:`flops_per_token`.
        layer: Which layer, from 0, as some may have no window; None for one with it.
    """
    left = model.window_size[0] if model.window_size and _has_window(model, layer) else -1
    samples = [model.seq_length] if lengths is None else list(lengths)
    return sum(_visible_pairs(n, left) for n in samples) / sum(samples)


def _visible_pairs(length: int, left: int) -> float:
    """Return how many pairs of query and key one sample has."""
    if left < 0 or left >= length:
        return length * (length + 1) / 2
    # The first `left` queries see all that precedes them, the others left + 1 keys.
    return left * (left + 1) / 2 + (length - left) * (left + 1)


def _has_window(model: ModelConfig, layer: int | None) -> bool:
    frequency = model.window_attn_skip_freq
    if layer is None or frequency is None:
        return True
    if isinstance(frequency, list):
        return bool(frequency[layer])
    return (layer + 1) % frequency != 0


def _layer_products(
    model: ModelConfig, layer: int, *, has_experts: int, lengths: Sequence[int] | None
) -> float:
    keys = visible_keys_per_query(model, lengths, layer=layer)
    attention = _latent_products if model.multi_latent_attention else _attention_products
    feed_forward = (
        _moe_products(model) if has_experts else _mlp_products(model, model.ffn_hidden_size or 0)
    )
    return attention(model, keys) + feed_forward


def _attention_products(model: ModelConfig, visible_keys: float) -> float:
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    queries = model.num_attention_heads * head
    keys = (model.num_query_groups or model.num_attention_heads) * head
    weights = model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size
    return weights + 2 * queries * visible_keys


def _latent_products(model: ModelConfig, visible_keys: float) -> float:
    hidden, heads, rank = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    width = model.qk_head_dim + model.qk_pos_emb_head_dim
    if model.q_lora_rank is None:
        weights = hidden * heads * width
    else:
        weights = (hidden + heads * width) * model.q_lora_rank
    weights += hidden * (rank + model.qk_pos_emb_head_dim)
    weights += rank * heads * (model.qk_head_dim + model.v_head_dim)
    weights += heads * model.v_head_dim * hidden
    return weights + heads * (width + model.v_head_dim) * visible_keys


def _mlp_products(model: ModelConfig, width: int) -> float:
    return float(model.hidden_size * width * (3 if model.gated_linear_unit else 2))


def _moe_products(model: ModelConfig) -> float:
    experts = model.num_moe_experts or 0
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size or 0
    products = model.moe_router_topk * _mlp_products(model, width)
    products += _mlp_products(model, model.moe_shared_expert_intermediate_size or 0)
    gate = model.hidden_size if model.moe_shared_expert_gate else 0
    return products + model.hidden_size * experts + gate


def _moe_pattern(model: ModelConfig) -> list[int]:
    """Return 1 for each layer with experts and 0 for each without."""
    if not model.num_moe_experts:
        return [0] * model.num_layers
    if isinstance(model.moe_layer_freq, list):
        return model.moe_layer_freq
    return [int(i % model.moe_layer_freq == 0) for i in range(model.num_layers)]
