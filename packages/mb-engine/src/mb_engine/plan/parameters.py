# SPDX-License-Identifier: Apache-2.0
"""The parameters of each model chunk, in the order in which megatron-core makes them.

The order matters: with the distributed optimizer each parameter begins at a multiple of 64 elements
of the gradient buffer.

Source: the modules of megatron-core 0.16.1 (``GPTModel``, ``TransformerLayer``, ``SelfAttention``,
``MLP``, ``MoELayer``) and of Transformer Engine; compared with built models in the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve, frozen

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
        row: Elements of one step along its first dimension, 1 for a vector.
    """

    name: str
    size: int
    expert: bool = False
    tied: bool = False
    replicated: bool = False
    row: int = 1


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
    share, ahead = model.share_embeddings_and_output_weights, bool(model.mtp_num_layers)
    hidden, several = model.hidden_size, degrees.pp > 1
    table = (model.padded_vocab_size or 0) // degrees.tp * hidden
    if held.embedding or held.mtp:
        tied = several and (ahead or share)
        found.append(Parameter("embedding.word_embeddings.weight", table, tied=tied, row=hidden))
        if model.position_embedding_type == "learned_absolute":
            size = (model.max_position_embeddings or 0) * hidden
            name = "embedding.position_embeddings.weight"
            found.append(Parameter(name, size, replicated=True, row=hidden))
    kinds = expert_layers(model)
    made: dict[bool, list[Parameter]] = {}
    for kind in {kinds[index] for index in held.layers}:
        made[kind] = list(layer_parameters(model, degrees, experts=kind, spec=spec))
    for index in held.layers:
        found += [evolve_name(p, f"decoder.layers.{index}.") for p in made[kinds[index]]]
    ends_here = model.num_layers - 1 in held.layers if ahead else held.loss
    if ends_here:
        found += _norm(model, "decoder.final_layernorm.", hidden)
    for index in range(held.mtp):
        layer = _layer_ahead(model, degrees, experts=kinds[-1], spec=spec)
        found += [evolve_name(p, f"mtp.layers.{index}.") for p in layer]
    if held.loss and not (share and held.embedding):
        tied = several and share and not held.mtp
        found.append(Parameter("output_layer.weight", table, tied=tied, row=hidden))
    return found


def evolve_name(parameter: Parameter, prefix: str) -> Parameter:
    """Return *parameter* under a longer name."""
    return evolve(parameter, name=prefix + parameter.name)


def _layer_ahead(
    model: ModelConfig, degrees: Degrees, *, experts: bool, spec: str
) -> Iterator[Parameter]:
    """Yield the parameters of one layer that predicts further ahead.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.2; megatron-core's
    ``MultiTokenPredictionLayer``.
    """
    hidden = model.hidden_size
    yield from _norm(model, "enorm.", hidden)
    yield from _norm(model, "hnorm.", hidden)
    yield Parameter("eh_proj.weight", 2 * hidden * hidden // degrees.tp, row=2 * hidden)
    for parameter in layer_parameters(model, degrees, experts=experts, spec=spec):
        yield evolve_name(parameter, "transformer_layer.")
    yield from _norm(model, "final_layernorm.", hidden)


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
    # Latent attention has no single projection that could take the norm in.
    latent = model.multi_latent_attention
    if not inside or latent:
        yield from _norm(model, "input_layernorm.", hidden)
    if latent:
        yield from _latent_attention(model, degrees, norm_inside=inside)
    else:
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
        if model.normalize_branch_outputs:
            yield from _norm(model, "mlp.linear_fc2.post_layernorm.", hidden)


def _norm(model: ModelConfig, prefix: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}weight", width, replicated=True)
    if model.normalization == "LayerNorm":
        yield Parameter(f"{prefix}bias", width, replicated=True)


def _attention(model: ModelConfig, degrees: Degrees, *, norm_inside: bool) -> Iterator[Parameter]:
    hidden, head, tp = model.hidden_size, model.kv_channels or 0, degrees.tp
    queries = model.num_attention_heads * head
    mixed = queries + 2 * (model.num_query_groups or 0) * head
    at = "self_attention."
    yield Parameter(f"{at}linear_proj.weight", hidden * queries // tp, row=queries // tp)
    if model.add_bias_linear or model.attention_output_bias:
        yield Parameter(f"{at}linear_proj.bias", hidden, replicated=True)
    if model.normalize_branch_outputs:
        yield from _norm(model, f"{at}linear_proj.post_layernorm.", hidden)
    if norm_inside:
        yield from _norm(model, f"{at}linear_qkv.layer_norm_", hidden)
    yield Parameter(f"{at}linear_qkv.weight", mixed * hidden // tp, row=hidden)
    if model.add_bias_linear or model.add_qkv_bias:
        yield Parameter(f"{at}linear_qkv.bias", mixed // tp)
    if model.qk_layernorm:
        yield from _norm(model, f"{at}q_layernorm.", head)
        yield from _norm(model, f"{at}k_layernorm.", head)


def _latent_attention(
    model: ModelConfig, degrees: Degrees, *, norm_inside: bool
) -> Iterator[Parameter]:
    """Yield the parameters of multi-head latent attention.

    The projections that compress are whole on every rank. Source: DeepSeek-V2, arXiv:2405.04434,
    section 2.1.
    """
    hidden, heads, tp = model.hidden_size, model.num_attention_heads, degrees.tp
    query = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim) // tp
    values = heads * model.v_head_dim // tp
    up = heads * (model.qk_head_dim + model.v_head_dim) // tp
    at, rank, compressed = "self_attention.", model.q_lora_rank, model.kv_lora_rank
    yield Parameter(f"{at}linear_proj.weight", hidden * values, row=values)
    if model.add_bias_linear:
        yield Parameter(f"{at}linear_proj.bias", hidden, replicated=True)
    normalized = model.qk_layernorm
    if rank is None:
        yield Parameter(f"{at}linear_q_proj.weight", query * hidden, row=hidden)
    else:
        size = rank * hidden
        yield Parameter(f"{at}linear_q_down_proj.weight", size, replicated=True, row=hidden)
        if normalized and norm_inside:
            yield from _norm(model, f"{at}linear_q_up_proj.layer_norm_", rank)
        yield Parameter(f"{at}linear_q_up_proj.weight", query * rank, row=rank)
    size = (compressed + model.qk_pos_emb_head_dim) * hidden
    yield Parameter(f"{at}linear_kv_down_proj.weight", size, replicated=True, row=hidden)
    if normalized and norm_inside:
        yield from _norm(model, f"{at}linear_kv_up_proj.layer_norm_", compressed)
    yield Parameter(f"{at}linear_kv_up_proj.weight", up * compressed, row=compressed)
    if normalized and not norm_inside:
        if rank is not None:
            yield from _norm(model, f"{at}q_layernorm.", rank)
        yield from _norm(model, f"{at}kv_layernorm.", compressed)


def _mlp(
    model: ModelConfig, prefix: str, width: int, *, ranks: int, expert: bool = False
) -> Iterator[Parameter]:
    hidden = model.hidden_size
    inner = width * (2 if model.gated_linear_unit else 1)
    yield Parameter(
        f"{prefix}linear_fc1.weight", inner * hidden // ranks, expert=expert, row=hidden
    )
    if model.add_bias_linear:
        yield Parameter(f"{prefix}linear_fc1.bias", inner // ranks, expert=expert)
    yield Parameter(
        f"{prefix}linear_fc2.weight", width * hidden // ranks, expert=expert, row=width // ranks
    )
    if model.add_bias_linear:
        yield Parameter(f"{prefix}linear_fc2.bias", hidden, expert=expert, replicated=not expert)


def _experts(model: ModelConfig, degrees: Degrees, *, spec: str) -> Iterator[Parameter]:
    count = model.num_moe_experts or 0
    size = count * model.hidden_size
    yield Parameter("mlp.router.weight", size, replicated=True, row=model.hidden_size)
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
                yield evolve(parameter, name=name)
    else:
        for index in range(here):
            for parameter in one:
                name = f"mlp.experts.local_experts.{index}.{parameter.name}"
                yield evolve(parameter, name=name)
    shared = model.moe_shared_expert_intermediate_size
    if shared:
        if model.moe_shared_expert_gate:
            size = model.hidden_size
            yield Parameter("mlp.shared_experts.gate_weight", size, replicated=True, row=size)
        yield from _mlp(model, "mlp.shared_experts.", shared, ranks=degrees.tp)
