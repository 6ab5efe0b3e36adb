# SPDX-License-Identifier: Apache-2.0
"""Which communication overlaps with computation: what follows by itself, and what goes together.

A field that is null is decided here, with the reason that ``explain`` shows; what was asked for
and cannot be is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft

_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000
_GEMMS = {f"{a}_{b}" for a in ("qkv", "proj", "fc1", "fc2") for b in ("fprop", "dgrad", "wgrad")}


def resolve(draft: Draft) -> None:
    """Decide on tensor, pipeline and expert parallelism."""
    _point_to_point(draft)
    _tensor(draft)
    _embedding(draft)
    _experts(draft)


def resolve_data_parallel(draft: Draft) -> None:
    """Decide on data parallelism; ``use_distributed_optimizer`` must be resolved."""
    config, ddp = draft.config, draft.config.ddp
    if ddp.use_megatron_fsdp:
        draft.fill("ddp.overlap_grad_reduce", False, "FSDP keeps whole gradients unless told")
        draft.fill("ddp.align_param_gather", False, "FSDP has no stages to align")
        return
    gathers = ddp.overlap_param_gather or config.optimizer.overlap_param_gather
    undecided = ddp.overlap_param_gather is None and config.optimizer.overlap_param_gather is None
    automatic = ddp.overlap_grad_reduce is None
    if gathers and ddp.use_distributed_optimizer:
        draft.fill("ddp.overlap_grad_reduce", True, "overlap_param_gather needs it")
    wanted, why = _pays_off(draft)
    draft.fill("ddp.overlap_grad_reduce", wanted, why)
    if undecided and automatic and wanted:
        whole = "full_iteration" in (config.cuda_graph.cuda_graph_scope or [])
        why = "off: a full-iteration CUDA graph holds no hooks" if whole else why
        draft.derive("ddp.overlap_param_gather", not whole, why)
    _bucket(draft)


def _pays_off(draft: Draft) -> tuple[bool, str]:
    """Return whether overlapping the reduction of gradients is worth it, and why."""
    config = draft.config
    ranks = (config.train.data_parallel_size or 1) * config.model.context_parallel_size
    if ranks == 1:
        return False, "off: one data-parallel rank has nobody to exchange with"
    if not config.ddp.use_distributed_optimizer:
        return False, "off: no use_distributed_optimizer, which splits the exchange into buckets"
    if config.dist.device == "cpu":
        return False, "off: gloo takes the cores that compute"
    return True, f"distributed optimizer over {ranks} ranks, DP x CP"


def _bucket(draft: Draft) -> None:
    ddp = draft.config.ddp
    if not ddp.overlap_grad_reduce:
        draft.require(
            ddp.bucket_size is None,
            "ddp.bucket_size",
            "has no effect without overlap_grad_reduce, which sends all gradients at once",
            "set ddp.overlap_grad_reduce=true, or leave it out",
        )
        return
    ranks = draft.config.train.data_parallel_size or 1
    draft.fill(
        "ddp.bucket_size",
        max(_BUCKET, _BUCKET_PER_RANK * ranks),
        f"the larger of {_BUCKET:,} and {_BUCKET_PER_RANK:,} x data_parallel_size {ranks}, which"
        " keeps the parts of a ring long enough for its bandwidth",
    )


def check_data_parallel(draft: Draft) -> None:
    """Check what goes together; all of data parallelism must be resolved."""
    ddp, optimizer, model = draft.config.ddp, draft.config.optimizer, draft.config.model
    if ddp.overlap_param_gather:
        draft.require(
            ddp.use_distributed_optimizer,
            "ddp.overlap_param_gather",
            "needs use_distributed_optimizer",
            "set ddp.use_distributed_optimizer=true",
        )
        draft.require(
            ddp.overlap_grad_reduce,
            "ddp.overlap_param_gather",
            "needs overlap_grad_reduce",
            "set ddp.overlap_grad_reduce=true",
        )
    interleaved = model.virtual_pipeline_model_parallel_size is not None
    on_cpu = draft.config.dist.device == "cpu"
    align = bool(ddp.overlap_param_gather and interleaved and not on_cpu)
    why = "gathers overlap and stages are interleaved" if align else "off: gathers do not overlap"
    if ddp.overlap_param_gather and not align:
        why = "off: gloo takes the cores that compute" if interleaved else "off: no virtual stages"
    draft.fill("ddp.align_param_gather", align, why)
    draft.require(
        not ddp.align_param_gather or ddp.overlap_param_gather,
        "ddp.align_param_gather",
        "needs overlap_param_gather",
        "set ddp.overlap_param_gather=true, or leave it out",
    )
    draft.require(
        not optimizer.overlap_param_gather_with_optimizer_step
        or (optimizer.overlap_param_gather and interleaved),
        "optimizer.overlap_param_gather_with_optimizer_step",
        "needs overlap_param_gather and virtual pipeline stages",
        "set both, or leave it out",
    )


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


def _tensor(draft: Draft) -> None:
    config, overlap = draft.config, draft.config.comm_overlap
    at = "comm_overlap.tp_comm_overlap"
    if not overlap.tp_comm_overlap:
        for name in ("tp_comm_overlap_cfg", "tp_comm_overlap_rs_dgrad"):
            draft.require(
                not getattr(overlap, name),
                f"comm_overlap.{name}",
                "has no effect without tp_comm_overlap",
                f"set {at}=true, or leave it out",
            )
        return
    lacking = [
        text
        for text, there in (
            ("tensor parallelism", config.model.tensor_model_parallel_size > 1),
            ("sequence parallelism", config.model.sequence_parallel),
            ("Transformer Engine layers", config.model.layer_spec != "torch"),
            ("CUDA", config.dist.device != "cpu"),
        )
        if not there
    ]
    draft.require(
        not lacking, at, f"needs {', '.join(lacking)}, which this run does not have", "leave it out"
    )
    unknown = sorted(set(overlap.tp_comm_overlap_cfg or ()) - _GEMMS)
    draft.require(
        not unknown,
        "comm_overlap.tp_comm_overlap_cfg",
        f"{', '.join(unknown)}: no such GEMM",
        f"use {', '.join(sorted(_GEMMS))}",
    )


def _embedding(draft: Draft) -> None:
    model, overlap = draft.config.model, draft.config.comm_overlap
    if overlap.defer_embedding_wgrad_compute:
        draft.require(
            model.pipeline_model_parallel_size > 1 and model.gradient_accumulation_fusion,
            "comm_overlap.defer_embedding_wgrad_compute",
            "needs pipeline parallelism and gradient_accumulation_fusion",
            "set both, or leave it out",
        )
        return
    draft.require(
        overlap.wgrad_deferral_limit == 0,
        "comm_overlap.wgrad_deferral_limit",
        "has no effect without defer_embedding_wgrad_compute",
        "set comm_overlap.defer_embedding_wgrad_compute=true, or leave it out",
    )


def _experts(draft: Draft) -> None:
    config, model, overlap = draft.config, draft.config.model, draft.config.comm_overlap
    draft.require(
        not overlap.delay_wgrad_compute or overlap.overlap_moe_expert_parallel_comm,
        "comm_overlap.delay_wgrad_compute",
        "needs overlap_moe_expert_parallel_comm",
        "set it, or leave this out",
    )
    draft.require(
        not overlap.delay_wgrad_compute or model.layer_spec != "torch",
        "comm_overlap.delay_wgrad_compute",
        "needs Transformer Engine layers, which can compute weight gradients apart",
        "leave it out",
    )
    if not overlap.overlap_moe_expert_parallel_comm:
        return
    recompute = config.recompute
    depth = model.megatron.get("mtp_num_layers") or getattr(model, "mtp_num_layers", None) or 0
    stages = model.pipeline_model_parallel_size
    rules = (
        (model.expert_model_parallel_size > 1, "needs EP > 1", "expert_model_parallel_size"),
        (
            model.moe_token_dispatcher_type in ("alltoall", "flex"),
            "needs the alltoall or flex dispatcher",
            "moe_token_dispatcher_type",
        ),
        (model.bf16 or model.fp16, "needs bf16 or fp16", "bf16"),
        (
            stages == 1 or model.virtual_pipeline_model_parallel_size is not None,
            "needs virtual stages where there are pipeline stages",
            "virtual_pipeline_model_parallel_size",
        ),
        (
            not model.moe_shared_expert_overlap,
            "excludes moe_shared_expert_overlap",
            "moe_shared_expert_overlap",
        ),
        (depth <= 1, "goes with one layer of multi-token prediction at most", "mtp_num_layers"),
    )
    at = "comm_overlap.overlap_moe_expert_parallel_comm"
    for holds, rule, field in rules:
        draft.require(holds, at, rule, f"change model.{field}, or leave it out")
    draft.require(
        recompute.recompute_granularity != "full"
        and "moe" not in (recompute.recompute_modules or []),
        at,
        "excludes full recomputation and that of moe",
        "recompute other modules, or leave it out",
    )
    draft.require(config.dist.device != "cpu", at, "needs CUDA streams", "leave it out")
