# SPDX-License-Identifier: Apache-2.0
"""What a layer of the te layer spec keeps for its backward pass.

From reading Transformer Engine 2.x and megatron-core 0.16.1 (``LayerNormLinear``, ``Linear``,
``DotProductAttention``, ``MLP``, ``TEGroupedMLP``); compared with a GPU by a test that needs one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_engine.plan.latent_activations import latent_attention
from mb_engine.plan.layout import exchange
from mb_engine.plan.saved import Saved
from mb_engine.plan.torch_activations import inner_copies, norm, routed_experts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import ConfigContainer

    from mb_engine.plan.layout import Degrees
    from mb_engine.plan.sizes import Sizes

_FLOAT = 4


def attention_half(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, windowed: bool, device: str
) -> Iterator[Saved]:
    """Yield what the first half of a transformer layer keeps.

    Args:
        config: Resolved.
        degrees: Of the job.
        sizes: Of one micro-batch.
        windowed: Whether the layer has the sliding window, which its kernels need no mask for.
        device: ``"cuda"``; Transformer Engine has no other.
    """
    del windowed
    # LayerNormLinear keeps the norm's input and output, both split by sequence parallelism.
    yield from norm(config, sizes, device=device)
    yield Saved("input of the projection", "norm_output", sizes.spread_hidden)
    if config.model.multi_latent_attention:
        yield from latent_attention(config, degrees, sizes, spec="te", device=device)
    else:
        yield from _attention(config, degrees, sizes)
    yield from _dropout(config, sizes)


def mlp_half(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, experts: bool, device: str
) -> Iterator[Saved]:
    """Yield what the second half of a transformer layer keeps.

    Args:
        config: Resolved.
        degrees: Of the job.
        sizes: Of one micro-batch.
        experts: Whether the layer has experts in place of a dense MLP.
        device: ``"cuda"``; Transformer Engine has no other.
    """
    model = config.model
    yield from norm(config, sizes, device=device)
    yield Saved("input of the MLP", "norm_output", sizes.spread_hidden)
    fused = model.bias_activation_fusion
    if experts:
        yield from routed_experts(config, degrees, sizes, fused=fused)
    else:
        width = sizes.tokens * (model.ffn_hidden_size or 0) // degrees.tp * sizes.element
        copies = inner_copies(model)
        if model.gated_linear_unit:
            # Unfused, megatron-core also adds an offset to the ungated half.
            copies = 3 if fused else 5
        yield Saved("inner activations", "mlp", width * copies)
    yield from _dropout(config, sizes)


def _dropout(config: ConfigContainer, sizes: Sizes) -> Iterator[Saved]:
    if config.model.hidden_dropout > 0:
        yield Saved("dropout mask", "dropout", sizes.spread_hidden / sizes.element)


def _attention(config: ConfigContainer, degrees: Degrees, sizes: Sizes) -> Iterator[Saved]:
    model = config.model
    heads = model.num_attention_heads // degrees.tp
    groups = max(1, (model.num_query_groups or 0) // degrees.tp)
    if model.qk_layernorm:
        statistics = sizes.tokens * (heads + groups) * _FLOAT
        yield Saved("head norms", "attention", sizes.query + sizes.key + statistics)
    # Queries and keys are new after the rotation; DotProductAttention makes values contiguous.
    yield Saved("queries, keys and values", "attention", sizes.query + 2 * sizes.key)
    if model.attention_backend in {"unfused", "local"}:
        scores = config.train.micro_batch_size * heads * sizes.length**2
        masked = 2 * sizes.element + 1 if model.attention_dropout > 0 else sizes.element
        yield Saved("probabilities", "core", scores * masked)
    else:
        yield Saved("log-sum-exp", "core", sizes.tokens * heads * _FLOAT)
    yield Saved("input of the output projection", "attention", sizes.query)
    if degrees.cp > 1 and exchange(model).startswith("a2a"):
        # Kept in both splits: by heads inside attention, by tokens for the projection.
        yield Saved("output by heads", "core", sizes.query)
