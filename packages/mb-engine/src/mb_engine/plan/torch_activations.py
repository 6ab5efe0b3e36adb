# SPDX-License-Identifier: Apache-2.0
"""What a layer of the torch layer spec keeps for its backward pass.

Compared in the tests with the storages that ``torch.autograd.graph.saved_tensors_hooks`` sees. Two
views of one storage keep all of it: the values, for instance, are a view of the fused projection to
queries, keys and values, so that all of this stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_engine.plan.latent_activations import latent_attention
from mb_engine.plan.layout import exchange
from mb_engine.plan.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import ConfigContainer
    from mb_config.sections.model import ModelConfig

    from mb_engine.plan.layout import Degrees
    from mb_engine.plan.sizes import Sizes

_FLOAT = 4
_INDEX = 8


def attention_half(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, windowed: bool, device: str
) -> Iterator[Saved]:
    """Yield what the first half of a transformer layer keeps.

    Args:
        config: Resolved.
        degrees: Of the job.
        sizes: Of one micro-batch.
        windowed: Whether the layer has the sliding window.
        device: ``"cpu"`` or ``"cuda"``.
    """
    yield from norm(config, sizes, device=device)
    yield Saved("input of the projection", "norm_output", sizes.spread_hidden)
    if config.model.multi_latent_attention:
        yield from latent_attention(config, degrees, sizes, spec="torch", device=device)
    else:
        yield from _attention(config, degrees, sizes, windowed=windowed, device=device)
    yield from branch_norm(config, sizes, device=device)
    yield from _dropout(config, sizes, device=device)


def mlp_half(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, experts: bool, device: str
) -> Iterator[Saved]:
    """Yield what the second half of a transformer layer keeps.

    Args:
        config: Resolved.
        degrees: Of the job.
        sizes: Of one micro-batch.
        experts: Whether the layer has experts in place of a dense MLP.
        device: ``"cpu"`` or ``"cuda"``.
    """
    model = config.model
    yield from norm(config, sizes, device=device)
    yield Saved("input of the MLP", "norm_output", sizes.spread_hidden)
    if experts:
        yield from routed_experts(config, degrees, sizes)
    else:
        width = sizes.tokens * (model.ffn_hidden_size or 0) // degrees.tp * sizes.element
        yield Saved("inner activations", "mlp", width * inner_copies(model))
        yield from branch_norm(config, sizes, device=device)
    yield from _dropout(config, sizes, device=device)


def norm(config: ConfigContainer, sizes: Sizes, *, device: str) -> Iterator[Saved]:
    """Yield what a norm of the residual stream keeps: its input or that normalized, and its scale."""
    model = config.model
    size, statistic = sizes.spread_hidden, sizes.spread_tokens * _FLOAT
    if model.fp32_residual_connection and device == "cuda":
        size = size // sizes.element * _FLOAT
    if model.normalization == "LayerNorm":
        yield Saved("norm input, mean and deviation", "norm", size + 2 * statistic)
    elif device == "cpu" and sizes.element < _FLOAT:
        # Torch composes it on a CPU: the float32 input and its normalized form.
        yield Saved("norm", "norm", 2 * size * _FLOAT // sizes.element + statistic)
    else:
        yield Saved("norm", "norm", size + statistic)


def branch_norm(config: ConfigContainer, sizes: Sizes, *, device: str) -> Iterator[Saved]:
    """Yield what the norm at the end of a branch keeps, where there is one."""
    if config.model.normalize_branch_outputs:
        for saved in norm(config, sizes, device=device):
            yield Saved("norm of the branch", "branch", saved.size)


def rotary_table(config: ConfigContainer, sizes: Sizes) -> float:
    """Return the bytes of angles, cosine and sine that all layers share."""
    if config.model.position_embedding_type != "rope" or config.model.multi_latent_attention:
        return 0.0
    rotated = sizes.length * (config.model.kv_channels or 0) * config.model.rotary_percent
    tables = 2 * rotated * sizes.element if _is_usual(config) else 0.0
    checkpointed = config.recompute.recompute_granularity == "full"
    return tables + (rotated * _FLOAT if checkpointed else 0.0)


def inner_copies(model: ModelConfig) -> int:
    """Return how many tensors of the MLP's inner width are kept.

    Gated: the projection (2), the activated gate, the product. Else the projection and the
    activated projection; relu keeps its result alone, which is the next linear's input.
    """
    if model.gated_linear_unit:
        return 4
    return 1 if model.activation_func == "relu" else 2


def _attention(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, windowed: bool, device: str
) -> Iterator[Saved]:
    model = config.model
    query, key, mixed = sizes.query, sizes.key, sizes.query + 2 * sizes.key
    groups = max(1, (model.num_query_groups or 0) // degrees.tp)
    grouped = model.num_attention_heads // degrees.tp > groups
    copied = grouped and groups > 1  # the queries of a group are then not contiguous
    recomputed = _recomputes_core(config)
    unfused = _is_unfused(config, device)
    if model.qk_layernorm:
        yield from _head_norms(config, degrees, sizes, device=device, copied=copied)
    if model.position_embedding_type == "rope" and not _is_usual(config):
        rotated = int((model.kv_channels or 0) * model.rotary_percent)
        yield Saved("cosine and sine", "attention", 4 * sizes.length * rotated * sizes.element)
    if degrees.cp > 1:
        yield from _over_ranks(config, degrees, sizes, copied=copied)
        return
    heads = model.num_attention_heads // degrees.tp
    if unfused and not recomputed:
        scores = config.train.micro_batch_size * heads * sizes.length**2 * sizes.element
        yield Saved("scaled queries and keys", "core", 2 * query)
        yield Saved("values", "core", query if grouped else mixed)
        yield Saved("probabilities", "core", scores * (3 if model.attention_dropout else 1))
        yield Saved("input of the output projection", "attention", query)
        return
    yield Saved("projection, by its values", "attention", mixed)
    if model.position_embedding_type == "rope" or model.qk_layernorm:
        yield Saved("rotated queries and keys", "attention", query + key)
        if copied and _is_usual(config):
            yield Saved("contiguous queries", "attention", query)
    elif copied:
        yield Saved("contiguous queries", "attention", query)
    scale = sizes.tokens * heads * _FLOAT
    if unfused:
        scores = config.train.micro_batch_size * heads * sizes.length**2 * sizes.element
        yield Saved("probabilities", "core", scores * (3 if model.attention_dropout else 1))
        yield Saved("scaled queries and keys", "core", 2 * query)
    else:
        yield Saved("log-sum-exp", "core", scale)
    if windowed:
        yield Saved("mask", "core", sizes.length**2 * sizes.element)
    yield Saved("input of the output projection", "attention", query)


def _over_ranks(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, copied: bool
) -> Iterator[Saved]:
    """Yield what attention over context-parallel ranks keeps, by how they exchange."""
    query, key, cp = sizes.query, sizes.key, degrees.cp
    heads = config.model.num_attention_heads // degrees.tp
    rotated = query + key if config.model.position_embedding_type == "rope" else query + 2 * key
    kind = exchange(config.model)
    if kind == "p2p":
        yield Saved("rotated queries and keys", "attention", rotated + (query if copied else 0))
        yield Saved("values", "attention", key)
    elif kind == "a2a":
        yield Saved("queries, keys and values of some heads", "attention", query + 2 * key)
        yield Saved("output of some heads", "core", query)
    else:
        # Each rank does two chunks, whose outputs are then put side by side.
        yield Saved("keys and values of all ranks", "attention", 2 * cp * key)
        yield Saved("queries", "attention", query if copied else rotated)
        yield Saved("outputs of both chunks", "core", query)
        chunk = sizes.length // 2
        yield Saved("masks", "core", chunk * chunk * (2 * cp + 1) * sizes.element)
    yield Saved("log-sum-exp", "core", sizes.tokens * heads * _FLOAT)
    yield Saved("input of the output projection", "attention", query)


def _head_norms(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, device: str, copied: bool
) -> Iterator[Saved]:
    model = config.model
    heads = (model.num_attention_heads + (model.num_query_groups or 0)) // degrees.tp
    statistics = sizes.tokens * heads * _FLOAT
    if model.normalization == "LayerNorm":
        # Keys, and queries that are not copied, are views of the projection, which stays anyway.
        yield Saved("head norms", "attention", (sizes.query if copied else 0) + 2 * statistics)
    elif device == "cuda":
        yield Saved("head norms", "attention", (sizes.query if copied else 0) + statistics)
    else:
        copies = 1 if sizes.element == _FLOAT else 4
        yield Saved("head norms", "attention", copies * (sizes.query + sizes.key) + statistics)


def routed_experts(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, fused: bool = False
) -> Iterator[Saved]:
    """Yield what router, experts and shared expert keep.

    The experts' tokens are taken to be evenly spread; the real number varies from step to step.
    """
    model = config.model
    routed = sizes.routed_tokens
    yield Saved("router", "router", _routing_bytes(model, degrees, sizes))
    yield Saved("inputs of experts", "experts", routed * model.hidden_size * sizes.element)
    width = routed * (model.moe_ffn_hidden_size or 0) // degrees.etp * sizes.element
    first = 2 if model.gated_linear_unit else 1
    # The activated product is kept before and after it is scaled with the router's weight.
    inner = first if fused else (first + 3 if model.gated_linear_unit else first + 1)
    if not model.gated_linear_unit and model.activation_func == "relu":
        inner = 1
    yield Saved("inner activations of experts", "experts", width * inner)
    yield Saved("inputs of second projections", "expert_activation", width)
    yield Saved("router weights", "experts", routed * sizes.element)
    shared = model.moe_shared_expert_intermediate_size
    if shared:
        size = sizes.tokens * shared // degrees.tp * sizes.element
        copies = inner_copies(model) + (1 if model.gated_linear_unit and not fused else 0)
        copies = 3 if fused and model.gated_linear_unit else copies
        yield Saved("shared expert", "shared", size * copies)
        if model.moe_shared_expert_gate:
            gated = sizes.spread_hidden + sizes.spread_tokens * sizes.element
            yield Saved("shared expert's gate", "shared", gated)


def _routing_bytes(model: ModelConfig, degrees: Degrees, sizes: Sizes) -> float:
    """Return chosen indices and weights, and the map of tokens to experts."""
    experts, topk, tokens = model.num_moe_experts or 0, model.moe_router_topk, sizes.spread_tokens
    chosen = tokens * topk * (_INDEX + _FLOAT)
    gathered = tokens * degrees.ep if model.moe_token_dispatcher_type == "allgather" else tokens  # noqa: S105
    here = experts // degrees.ep if model.moe_token_dispatcher_type == "allgather" else experts  # noqa: S105
    mapped = gathered * here * (1 + sizes.element) + sizes.routed_tokens * _INDEX
    balancing = 0.0
    if model.moe_aux_loss_coeff > 0:
        balancing = tokens * (experts * _FLOAT + topk * _INDEX)
    if model.moe_z_loss_coeff:
        balancing += tokens * (2 * experts + 2) * _FLOAT
    return chosen + mapped + balancing


def _dropout(config: ConfigContainer, sizes: Sizes, *, device: str) -> Iterator[Saved]:
    if config.model.hidden_dropout > 0:
        size = sizes.spread_hidden
        yield Saved("dropout mask", "dropout", size if device == "cpu" else size / sizes.element)


def _recomputes_core(config: ConfigContainer) -> bool:
    recompute = config.recompute
    if recompute.recompute_granularity != "selective":
        return False
    return "core_attn" in (recompute.recompute_modules or ["core_attn"])


def _is_usual(config: ConfigContainer) -> bool:
    """Return whether attention goes the short way of ``TorchSelfAttention``."""
    model = config.model
    return (
        not model.qk_layernorm
        and not model.rotary_interleaved
        and model.rotary_percent == 1.0
        and model.position_embedding_type == "rope"
        and (model.num_query_groups or 0) >= model.tensor_model_parallel_size
        and not _recomputes_core(config)
    )


def _is_unfused(config: ConfigContainer, device: str) -> bool:
    """Return whether attention makes its probabilities; on a CPU dropout needs them."""
    model = config.model
    if model.attention_backend in {"unfused", "local"}:
        return True
    return device == "cpu" and model.attention_dropout > 0
