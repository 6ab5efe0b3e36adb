# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of one token, for TFLOP/s and model FLOPs utilization.

Counted are the matrix products, a multiplication and an addition as two operations; norms,
activations, softmax and the embedding lookup are not. The backward pass is twice the forward pass.
Recomputed activations are not counted: these are the model's operations, not the machine's.

Attention is counted *causally*: a query is multiplied with the keys it sees, on average
``(S + 1) / 2`` of S, or fewer with a sliding window. (The appendix of PaLM counts all S.)

Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B; Narayanan et al. 2021,
arXiv:2104.04473, appendix, extended to grouped queries, gated MLPs and experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mb_config import ConfigContainer
    from mb_config.sections.model import ModelConfig

_FORWARD_AND_BACKWARD = 3.0
_MULTIPLY_AND_ADD = 2.0


def flops_per_token(config: ConfigContainer) -> float:
    """Return the operations of forward and backward of one token, averaged over a sequence.

    Args:
        config: Resolved, so that no size is None.
    """
    return _FORWARD_AND_BACKWARD * forward_flops_per_token(config.model)


def forward_flops_per_token(model: ModelConfig) -> float:
    """Return the operations of the forward pass of one token, averaged over a sequence.

    Args:
        model: The resolved ``model`` section.
    """
    moe_layers = sum(_moe_pattern(model))
    products = model.num_layers * _attention_products(model)
    products += (model.num_layers - moe_layers) * _mlp_products(model, model.ffn_hidden_size or 0)
    products += moe_layers * _moe_products(model)
    products += model.hidden_size * (model.padded_vocab_size or 0)
    return _MULTIPLY_AND_ADD * products


def visible_keys_per_query(model: ModelConfig) -> float:
    """Return how many keys a query sees, averaged over a sequence, causal and within the window."""
    length = model.seq_length
    left = model.window_size[0] if model.window_size else -1
    if left < 0 or left >= length:
        return (length + 1) / 2
    # The first `left` queries see all that precedes them, the others left + 1 keys.
    return (left * (left + 1) / 2 + (length - left) * (left + 1)) / length


def _attention_products(model: ModelConfig) -> float:
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    queries = model.num_attention_heads * head
    keys = (model.num_query_groups or model.num_attention_heads) * head
    weights = model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size
    scores_and_values = 2 * queries * visible_keys_per_query(model)
    return weights + scores_and_values


def _mlp_products(model: ModelConfig, width: int) -> float:
    return float(model.hidden_size * width * (3 if model.gated_linear_unit else 2))


def _moe_products(model: ModelConfig) -> float:
    experts = model.num_moe_experts or 0
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size or 0
    products = model.moe_router_topk * _mlp_products(model, width)
    products += _mlp_products(model, model.moe_shared_expert_intermediate_size or 0)
    return products + model.hidden_size * experts


def _moe_pattern(model: ModelConfig) -> list[int]:
    """Return 1 for each layer with experts and 0 for each without."""
    if not model.num_moe_experts:
        return [0] * model.num_layers
    if isinstance(model.moe_layer_freq, list):
        return model.moe_layer_freq
    return [int(i % model.moe_layer_freq == 0) for i in range(model.num_layers)]
