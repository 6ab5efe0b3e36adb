# SPDX-License-Identifier: Apache-2.0
"""The parameters of each model chunk, in the order in which megatron-core makes them.

The order matters: with the distributed optimizer each parameter begins at a multiple of 64 elements
of the gradient buffer.

Source: the modules of megatron-core 0.16.1 (``GPTModel``, ``TransformerLayer``, ``SelfAttention``,
``MLP``, ``MoELayer``) and of Transformer Engine; compared with built models in the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from mb_engine.plan.layout import Degrees, expert_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config.pipeline import Chunk
    from mb_config.sections.model import ModelConfig


@frozen
class Parameter:
    """One parameter on one rank.

    Attributes:
        name: As in megatron-core, without the prefix of the layer.
        size: Elements on this rank.
        expert: Whether its gradient is reduced over expert-data-parallel ranks.
        tied: Whether first and last pipeline stage each have a copy.
        replicated: Whether all tensor-parallel ranks hold it whole.
    """

    name: str
    size: int
    expert: bool = False
    tied: bool = False
    replicated: bool = False


def chunk_parameters(
    model: ModelConfig, degrees: Degrees, held: Chunk, *, spec: str
) -> list[Parameter]:
    """Return the parameters of one model chunk.

    Args:
        model: Resolved.
        degrees: Of the job.
        held: What the chunk holds.
        spec: ``"torch"`` or ``"te"``.
    """
    found: list[Parameter] = []
    tied = model.share_embeddings_and_output_weights and degrees.pp > 1
    table = (model.padded_vocab_size or 0) // degrees.tp * model.hidden_size
    if held.embedding:
        found.append(Parameter("embedding.word_embeddings.weight", table, tied=tied))
        if model.position_embedding_type == "learned_absolute":
            size = (model.max_position_embeddings or 0) * model.hidden_size
            name = "embedding.position_embeddings.weight"
            found.append(Parameter(name, size, replicated=True))
    kinds = expert_layers(model)
    made: dict[bool, list[Parameter]] = {}
    for index in held.layers:
        kind = kinds[index]
        if kind not in made:
            made[kind] = list(layer_parameters(model, degrees, experts=kind, spec=spec))
        found += made[kind]
    if held.loss:
        found += _norm(model, "final_layernorm.", model.hidden_size)
        if not model.share_embeddings_and_output_weights or degrees.pp * degrees.vpp > 1:
            found.append(Parameter("output_layer.weight", table, tied=tied))
    return found


def layer_parameters(
    model: ModelConfig, degrees: Degrees, *, experts: bool, spec: str
) -> Iterator[Parameter]:
    """Yield the parameters of one transformer layer.

    Args:
        model: Resolved.
        degrees: Of the job.
        experts: Whether the layer has experts in place of a dense MLP.
        spec: ``"torch"`` or ``"te"``; Transformer Engine keeps norms in the linear that follows.
    """
    hidden = model.hidden_size
    inside = spec == "te"
    if not inside:
        yield from _norm(model, "input_layernorm.", hidden)
    yield from _attention(model, degrees, norm_inside=inside)
    if not inside or experts:
        yield from _norm(model, "pre_mlp_layernorm.", hidden)
    if experts:
        yield from _experts(model, degrees, spec=spec)
    else:
        width = model.ffn_hidden_size or 0
        if inside:
            yield from _norm(model, "mlp.linear_fc1.layer_norm_", hidden)
        yield from _mlp(model, "mlp.", width, ranks=degrees.tp)


def _norm(model: ModelConfig, prefix: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}weight", width, replicated=True)
    if model.normalization == "LayerNorm":
        yield Parameter(f"{prefix}bias", width, replicated=True)


def _attention(model: ModelConfig, degrees: Degrees, *, norm_inside: bool) -> Iterator[Parameter]:
    hidden, head, tp = model.hidden_size, model.kv_channels or 0, degrees.tp
    queries = model.num_attention_heads * head
    mixed = queries + 2 * (model.num_query_groups or 0) * head
    at = "self_attention."
    yield Parameter(f"{at}linear_proj.weight", hidden * queries // tp)
    if model.add_bias_linear:
        yield Parameter(f"{at}linear_proj.bias", hidden, replicated=True)
    if norm_inside:
        yield from _norm(model, f"{at}linear_qkv.layer_norm_", hidden)
    yield Parameter(f"{at}linear_qkv.weight", mixed * hidden // tp)
    if model.add_bias_linear or model.add_qkv_bias:
        yield Parameter(f"{at}linear_qkv.bias", mixed // tp)
    if model.qk_layernorm:
        yield from _norm(model, f"{at}q_layernorm.", head)
        yield from _norm(model, f"{at}k_layernorm.", head)


def _mlp(
    model: ModelConfig, prefix: str, width: int, *, ranks: int, expert: bool = False
) -> Iterator[Parameter]:
    hidden = model.hidden_size
    inner = width * (2 if model.gated_linear_unit else 1)
    yield Parameter(f"{prefix}linear_fc1.weight", inner * hidden // ranks, expert=expert)
    if model.add_bias_linear:
        yield Parameter(f"{prefix}linear_fc1.bias", inner // ranks, expert=expert)
    yield Parameter(f"{prefix}linear_fc2.weight", width * hidden // ranks, expert=expert)
    if model.add_bias_linear:
        yield Parameter(f"{prefix}linear_fc2.bias", hidden, expert=expert, replicated=not expert)


def _experts(model: ModelConfig, degrees: Degrees, *, spec: str) -> Iterator[Parameter]:
    count = model.num_moe_experts or 0
    yield Parameter("mlp.router.weight", count * model.hidden_size, replicated=True)
    if model.add_bias_linear:
        yield Parameter("mlp.router.bias", count, replicated=True)
    # With one expert rank megatron-core reduces experts like all other parameters.
    apart = degrees.ep > 1
    one = list(_mlp(model, "", model.moe_ffn_hidden_size or 0, ranks=degrees.etp, expert=apart))
    here = count // degrees.ep
    if model.moe_grouped_gemm and spec == "te":
        for parameter in one:
            for index in range(here):
                name = f"mlp.experts.{parameter.name}{index}"
                yield Parameter(name, parameter.size, apart)
    else:
        for index in range(here):
            for parameter in one:
                name = f"mlp.experts.local_experts.{index}.{parameter.name}"
                yield Parameter(name, parameter.size, apart)
    shared = model.moe_shared_expert_intermediate_size
    if shared:
        yield from _mlp(model, "mlp.shared_experts.", shared, ranks=degrees.tp)
