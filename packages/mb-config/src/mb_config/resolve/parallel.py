# SPDX-License-Identifier: Apache-2.0
"""How ranks are divided: tensor, pipeline, context, expert and data parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_config.resolve import pipeline

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft


def resolve(draft: Draft) -> None:
    """Derive the data-parallel size and check what each kind of parallelism divides."""
    _data_parallel(draft)
    _sequence_parallel(draft)
    pipeline.resolve(draft)
    _context(draft)
    _expert(draft)


def _data_parallel(draft: Draft) -> None:
    model, world = draft.config.model, draft.world_size
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    cp = model.context_parallel_size
    size = tp * pp * cp
    if world % size:
        draft.deny(
            "model.tensor_model_parallel_size",
            f"world size {world} must be a multiple of TP x PP x CP = {tp} x {pp} x {cp} = {size}",
            f"start {-(-world // size) * size} ranks, or change one of the three",
        )
        return
    why = f"world size {world} / (TP {tp} x PP {pp} x CP {cp})"
    draft.fix("train.data_parallel_size", world // size, why)


def _sequence_parallel(draft: Draft) -> None:
    model = draft.config.model
    tp, cp = model.tensor_model_parallel_size, model.context_parallel_size
    if not model.sequence_parallel:
        return
    if not draft.require(
        tp > 1,
        "model.sequence_parallel",
        "needs tensor parallelism, here tensor_model_parallel_size=1",
        "set model.sequence_parallel=false, or raise model.tensor_model_parallel_size",
    ):
        return
    draft.require(
        model.seq_length % (tp * cp) == 0,
        "model.seq_length",
        f"must be a multiple of TP x CP = {tp} x {cp} with sequence_parallel",
        f"use {_up(model.seq_length, tp * cp)}, or set model.sequence_parallel=false",
    )


def _context(draft: Draft) -> None:
    model = draft.config.model
    cp, tp = model.context_parallel_size, model.tensor_model_parallel_size
    kinds, sizes = model.cp_comm_type, model.hierarchical_context_parallel_sizes
    known = ("p2p", "all_gather", "a2a", "a2a+p2p")
    given = kinds if isinstance(kinds, list) else [kinds] if kinds else []
    if cp == 1:
        for name in ("cp_comm_type", "hierarchical_context_parallel_sizes"):
            draft.require(
                getattr(model, name) is None,
                f"model.{name}",
                "needs context parallelism, here context_parallel_size=1",
                "leave it out, or raise model.context_parallel_size",
            )
        return
    _whole_means(draft)
    draft.require(
        model.seq_length % (2 * cp) == 0,
        "model.seq_length",
        f"must be a multiple of 2 x context_parallel_size = {2 * cp}",
        f"use {_up(model.seq_length, 2 * cp)}",
    )
    draft.require(
        all(k in known for k in given),
        "model.cp_comm_type",
        f"must be one of {', '.join(known)}, or a list of them",
        "correct the name",
    )
    draft.require(
        not isinstance(kinds, list) or len(kinds) == model.num_layers,
        "model.cp_comm_type",
        f"a list must name one for each of the {model.num_layers} layers",
        "give one name for all",
    )
    groups = model.num_query_groups or model.num_attention_heads
    draft.require(
        "a2a" not in given or groups % (tp * cp) == 0,
        "model.cp_comm_type",
        f"a2a needs num_query_groups={groups} to be a multiple of TP x CP = {tp * cp}",
        "use p2p or all_gather",
    )
    product = 1
    for size in sizes or []:
        product *= size
    draft.require(
        "a2a+p2p" not in given or (sizes and product == cp),
        "model.hierarchical_context_parallel_sizes",
        f"a2a+p2p needs sizes whose product is context_parallel_size={cp}",
        f"set it, for example to [{cp // 2}, 2]" if cp % 2 == 0 else "use p2p",
    )
    draft.require(
        sizes is None or "a2a+p2p" in given,
        "model.hierarchical_context_parallel_sizes",
        "only cp_comm_type a2a+p2p uses it",
        "leave it out, or set model.cp_comm_type=a2a+p2p",
    )


def _whole_means(draft: Draft) -> None:
    draft.require(
        draft.config.model.calculate_per_token_loss,
        "model.calculate_per_token_loss",
        "must be true with context parallelism: the mean of the means over parts of a sequence is"
        " not the mean over its tokens",
        "set it to true",
    )


def _expert(draft: Draft) -> None:
    model = draft.config.model
    ep, etp = model.expert_model_parallel_size, model.expert_tensor_parallel_size
    if model.num_moe_experts is None:
        draft.require(
            ep == 1,
            "model.expert_model_parallel_size",
            "needs experts",
            "set model.num_moe_experts, or leave it at 1",
        )
        draft.require(
            etp is None,
            "model.expert_tensor_parallel_size",
            "needs experts",
            "set model.num_moe_experts, or leave it out",
        )
        return
    draft.fill(
        "model.expert_tensor_parallel_size",
        model.tensor_model_parallel_size,
        "tensor_model_parallel_size",
    )
    draft.require(
        model.num_moe_experts % ep == 0,
        "model.num_moe_experts",
        f"must be a multiple of expert_model_parallel_size={ep}",
        f"use {_up(model.num_moe_experts, ep)} experts, or change the expert parallel size",
    )
    size = (model.expert_tensor_parallel_size or 1) * ep * model.pipeline_model_parallel_size
    draft.require(
        draft.world_size % size == 0,
        "model.expert_model_parallel_size",
        f"world size {draft.world_size} must be a multiple of expert TP x EP x PP = {size}",
        "change one of them",
    )
    draft.require(
        model.tensor_model_parallel_size == 1 or model.sequence_parallel,
        "model.sequence_parallel",
        "experts with tensor parallelism need sequence parallelism in training",
        "set model.sequence_parallel=true",
    )


def _up(value: int, multiple: int) -> int:
    return max(1, -(-value // multiple)) * multiple
