# SPDX-License-Identifier: Apache-2.0
"""How ranks are divided: tensor, pipeline, context, expert and data parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft

_OWN_SPLIT = (
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def resolve(draft: Draft) -> None:
    """Derive the data-parallel size and check what each kind of parallelism divides."""
    _data_parallel(draft)
    _sequence_parallel(draft)
    _pipeline(draft)
    _point_to_point(draft)
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


def _pipeline(draft: Draft) -> None:
    model = draft.config.model
    pp, vpp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    first = model.num_layers_in_first_pipeline_stage
    last = model.num_layers_in_last_pipeline_stage
    if pp == 1:
        for name in (
            "virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        ):
            draft.require(
                getattr(model, name) is None,
                f"model.{name}",
                "needs pipeline parallelism, here pipeline_model_parallel_size=1",
                "leave it out, or raise model.pipeline_model_parallel_size",
            )
        return
    if any(name in model.megatron for name in _OWN_SPLIT) or model.num_layers < 1:
        return
    stages = _stages(draft, first, last)
    if vpp is None or stages is None:
        return
    for layers in stages:
        if not draft.require(
            layers % vpp == 0,
            "model.virtual_pipeline_model_parallel_size",
            f"must divide the {layers} layers of a pipeline stage",
            "choose a divisor, or change model.num_layers",
        ):
            return


def _stages(draft: Draft, first: int | None, last: int | None) -> list[int] | None:
    """Return the different numbers of layers of the stages, or None after a violation."""
    model = draft.config.model
    pp = model.pipeline_model_parallel_size
    given = [n for n in (first, last) if n is not None]
    layers, places = model.num_layers - sum(given), pp - len(given)
    if not given:
        fits = draft.require(
            layers % pp == 0,
            "model.num_layers",
            f"must be a multiple of pipeline_model_parallel_size={pp}",
            f"use {_up(layers, pp)} layers, or set model.num_layers_in_first_pipeline_stage",
        )
        return [layers // pp] if fits else None
    name = "first" if first is not None else "last"
    fits = draft.require(
        (layers == 0 if places == 0 else layers > 0 and layers % places == 0),
        f"model.num_layers_in_{name}_pipeline_stage",
        f"leaves {layers} of {model.num_layers} layers for {places} other stages",
        "choose numbers that leave a positive multiple of the other stages",
    )
    if not fits:
        return None
    return given + ([layers // places] if places else [])


def _point_to_point(draft: Draft) -> None:
    model, overlap = draft.config.model, draft.config.comm_overlap
    pp = model.pipeline_model_parallel_size
    interleaved = pp > 1 and model.virtual_pipeline_model_parallel_size is not None
    kind = "interleaved pipeline" if interleaved else "pipeline" if pp > 1 else "no pipeline"
    explicit = overlap.overlap_p2p_comm is not None or overlap.batch_p2p_comm is not None
    draft.fill("comm_overlap.overlap_p2p_comm", interleaved, kind)
    batched = pp > 1 and not overlap.overlap_p2p_comm
    draft.fill(
        "comm_overlap.batch_p2p_comm",
        batched,
        f"{kind}, overlap_p2p_comm {overlap.overlap_p2p_comm}",
    )
    if not explicit:
        return
    if pp == 2 and interleaved:
        draft.require(
            overlap.overlap_p2p_comm and not overlap.batch_p2p_comm,
            "comm_overlap.overlap_p2p_comm"
            if not overlap.overlap_p2p_comm
            else "comm_overlap.batch_p2p_comm",
            "2 pipeline stages with virtual stages give wrong results unless overlap_p2p_comm=True"
            " and batch_p2p_comm=False, since previous and next stage are the same rank",
            "leave both out",
        )
        return
    draft.require(
        not (overlap.overlap_p2p_comm and overlap.batch_p2p_comm),
        "comm_overlap.batch_p2p_comm",
        "excludes overlap_p2p_comm",
        "leave both out",
    )
    draft.require(
        interleaved or not overlap.overlap_p2p_comm,
        "comm_overlap.overlap_p2p_comm",
        "only the interleaved pipeline can overlap its sends",
        "leave it out, or set model.virtual_pipeline_model_parallel_size",
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
    draft.require(
        model.calculate_per_token_loss,
        "model.calculate_per_token_loss",
        "must be true with context parallelism: the mean of the means over parts of a sequence is"
        " not the mean over its tokens",
        "set it to true",
    )
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
