# SPDX-License-Identifier: Apache-2.0
"""An estimate of the time of one step, to put layouts in order; not a promise of a throughput.

The slowest pipeline stage sets the pace of a micro-batch; a step is

    (m + (pp - 1) / vpp) x (compute + recomputation + exposed communication of a micro-batch)
    + exposed reduction of gradients and gathering of parameters + optimizer

with m micro-batches. Every constant is stated below. ``own`` means: our own estimate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from mb_engine.model.flops import flops_per_token, visible_keys_per_query
from mb_engine.plan.compute import forward_flops_by_stage
from mb_engine.plan.layout import expert_layers, ring_share
from mb_engine.plan.memory import parameter_bytes
from mb_engine.plan.sizes import Sizes

if TYPE_CHECKING:
    from mb_config import ConfigContainer
    from mb_config.sections.model import ModelConfig

    from mb_engine.plan.communication import Traffic
    from mb_engine.plan.hardware import Gpu
    from mb_engine.plan.layout import Degrees
    from mb_engine.plan.ranks import Plan, RankPlan

ACHIEVABLE = 0.65
"""Part of the peak rate that large layers reach (own; NVIDIA reports 50 to 60 % for whole steps)."""
HALF_ROWS = 256
"""Tokens of a micro-batch at which products reach half of that (own)."""
HALF_COLUMNS = 256
"""Inner width a rank at which they do (own)."""
LINK_EFFICIENCY = 0.8
"""Part of a link's bandwidth that collectives reach (own)."""
TP_OVERLAPPED = 0.7
"""Part of the tensor-parallel communication that ``tp_comm_overlap`` hides (own)."""

_FORWARD_AND_BACKWARD = 3
_ONCE_A_STEP = ("dp_", "edp_", "tp_gradient", "tied_")
_ALL_TO_ALL = ("all_to_all", "p2p")


@frozen(kw_only=True)
class StepTime:
    """Seconds of one step by what takes them; they add up to ``total_s``.

    Attributes:
        compute_s: Model FLOPs of the slowest stage.
        recompute_s: Repeated forward passes.
        tensor_s: Exposed tensor- and sequence-parallel communication.
        context_s: Exposed context-parallel communication.
        expert_s: Dispatch to experts and back.
        pipeline_s: Exposed sends between stages.
        bubble_s: Waiting for the pipeline to fill and drain.
        data_s: Exposed reduction of gradients and gathering of parameters.
        optimizer_s: Reading and writing of the optimizer's state.
        total_s: All of them.
        tokens_per_second_per_gpu: That the total amounts to.
        model_flops_utilization: Model FLOPs over what the GPUs could do in that time.
    """

    compute_s: float
    recompute_s: float
    tensor_s: float
    context_s: float
    expert_s: float
    pipeline_s: float
    bubble_s: float
    data_s: float
    optimizer_s: float
    total_s: float
    tokens_per_second_per_gpu: float
    model_flops_utilization: float


def step_time(plan: Plan, gpu: Gpu) -> StepTime:
    """Return the estimated time of a step of *plan* on *gpu*."""
    stages = {group.pp_rank: group for group in plan.groups}
    times = [_stage_time(plan, gpu, group) for group in stages.values()]
    slowest = max(times, key=lambda parts: sum(parts.values()))
    count = plan.config.train.num_microbatches or 1
    bubble = (plan.degrees.pp - 1) / plan.degrees.vpp / count * sum(slowest.values())
    a_microbatch = slowest["compute"] / count
    data = max(_once_a_step(plan, gpu, group, a_microbatch) for group in plan.groups)
    optimizer = max(_optimizer_time(group, gpu) for group in plan.groups)
    total = sum(slowest.values()) + bubble + data + optimizer
    tokens = (plan.config.train.global_batch_size or 0) * plan.config.model.seq_length
    peak = _rate(plan.config, gpu)
    return StepTime(
        compute_s=slowest["compute"],
        recompute_s=slowest["recompute"],
        tensor_s=slowest["tensor"],
        context_s=slowest["context"],
        expert_s=slowest["expert"],
        pipeline_s=slowest["pipeline"],
        bubble_s=bubble,
        data_s=data,
        optimizer_s=optimizer,
        total_s=total,
        tokens_per_second_per_gpu=tokens / total / plan.degrees.world,
        model_flops_utilization=plan.model_flops / total / plan.degrees.world / peak,
    )


def least_time(config: ConfigContainer, degrees: Degrees, rows: int, gpu: Gpu) -> float:
    """Return seconds that a step surely takes longer than, at the cost of a few operations.

    Args:
        config: Resolved, in any layout.
        degrees: The layout.
        rows: The micro-batch size.
        gpu: Which GPU.
    """
    model = config.model
    batch = config.train.global_batch_size or 0
    tokens = model.seq_length // degrees.cp * rows
    routed = tokens // (max(1, degrees.tp)) * model.moe_router_topk * degrees.etp
    rate = _rate(config, gpu) * ACHIEVABLE * _saturated(model, degrees, tokens, routed)
    compute = flops_per_token(config) * batch * model.seq_length / degrees.world / rate
    count = batch / (rows * degrees.dp)
    # Five gathers and five scatters of the residual stream a layer, at least in its attention.
    halves = 1 if model.num_moe_experts else 2
    hidden = tokens * model.hidden_size * parameter_bytes(config) * ring_share(degrees.tp)
    sent = 5 * halves * hidden * model.num_layers / degrees.pp * count
    hidden_part = TP_OVERLAPPED if config.comm_overlap.tp_comm_overlap else 0.0
    tensor = sent / (gpu.link_bandwidth * LINK_EFFICIENCY) * (1 - hidden_part)
    bubble = (degrees.pp - 1) / degrees.vpp / count
    return (compute + tensor) * (1 + bubble)


def _stage_time(plan: Plan, gpu: Gpu, group: RankPlan) -> dict[str, float]:
    """Return the seconds of all micro-batches on one stage, by what takes them."""
    rate = _rate(plan.config, gpu) * ACHIEVABLE * _saturation(plan)
    compute = group.model_flops / rate
    parts = {"tensor": 0.0, "context": 0.0, "expert": 0.0, "pipeline": 0.0}
    overlap = plan.config.comm_overlap
    attention = compute * _attention_share(plan) if plan.degrees.cp > 1 else 0.0
    for traffic in group.traffic:
        axis = traffic.kind.split("_")[0]
        if traffic.kind.startswith(_ONCE_A_STEP):
            continue
        seconds = traffic.sent_bytes / _bandwidth(gpu, traffic)
        if axis in {"tp", "sp"}:
            hidden = TP_OVERLAPPED if overlap.tp_comm_overlap else 0.0
            parts["tensor"] += seconds * (1 - hidden)
        elif axis == "pp":
            parts["pipeline"] += 0.0 if overlap.overlap_p2p_comm else seconds
        elif traffic.kind == "cp_p2p":
            # Passed round while attention computes: what is longer shows.
            parts["context"] += max(0.0, seconds - attention)
        elif axis == "cp":
            parts["context"] += seconds
        else:
            hidden = 0.5 if overlap.overlap_moe_expert_parallel_comm else 0.0
            parts["expert"] += seconds * (1 - hidden)
    return {"compute": compute, "recompute": compute * _repeated(plan), **parts}


def _repeated(plan: Plan) -> float:
    """Return recomputed operations as a part of all others."""
    recompute, model = plan.config.recompute, plan.config.model
    if recompute.recompute_granularity == "full":
        part = 1.0
        if recompute.recompute_method == "block":
            chunks = plan.degrees.pp * plan.degrees.vpp
            part = min(1.0, (recompute.recompute_num_layers or 0) * chunks / model.num_layers)
        return part / _FORWARD_AND_BACKWARD
    if recompute.recompute_granularity is None:
        return 0.0
    modules = recompute.recompute_modules or ["core_attn"]
    part = _attention_share(plan) if "core_attn" in modules else 0.0
    if {"mlp", "moe"} & set(modules):
        part += _mlp_share(plan)
    return part / _FORWARD_AND_BACKWARD


def _attention_share(plan: Plan) -> float:
    """Return the part of the operations that the products of scores and values take."""
    model = plan.config.model
    queries = model.num_attention_heads * (model.kv_channels or 0)
    scores = 4.0 * queries * visible_keys_per_query(model) * model.num_layers
    return min(1.0, scores / sum(forward_flops_by_stage(model)))


def _mlp_share(plan: Plan) -> float:
    """Return the part of the operations that MLPs and experts take."""
    model = plan.config.model
    linears = 3 if model.gated_linear_unit else 2
    widths = [
        model.moe_router_topk * (model.moe_ffn_hidden_size or 0)
        + (model.moe_shared_expert_intermediate_size or 0)
        if experts
        else model.ffn_hidden_size or 0
        for experts in expert_layers(model)
    ]
    total = 2.0 * linears * model.hidden_size * sum(widths)
    return min(1.0, total / sum(forward_flops_by_stage(model)))


def _saturation(plan: Plan) -> float:
    """Return how near to their best rate products of these sizes come."""
    sizes = Sizes.from_config(plan.config, plan.degrees)
    return _saturated(plan.config.model, plan.degrees, sizes.tokens, sizes.routed_tokens)


def _saturated(model: ModelConfig, degrees: Degrees, tokens: float, routed: float) -> float:
    rows, columns = tokens, (model.ffn_hidden_size or 0) / degrees.tp
    if model.num_moe_experts:
        rows = routed / (model.num_moe_experts / degrees.ep)
        columns = (model.moe_ffn_hidden_size or 0) / degrees.etp
    return rows / (rows + HALF_ROWS) * columns / (columns + HALF_COLUMNS)


def _once_a_step(plan: Plan, gpu: Gpu, group: RankPlan, a_microbatch: float) -> float:
    """Return the seconds of gradients and parameters that computation does not hide."""
    ddp, exposed = plan.config.ddp, 0.0
    hidden_forward, hidden_backward = a_microbatch / 3, a_microbatch * 2 / 3
    for traffic in group.traffic:
        if not traffic.kind.startswith(_ONCE_A_STEP):
            continue
        seconds = traffic.sent_bytes / _bandwidth(gpu, traffic)
        if "parameter" in traffic.kind and ddp.overlap_param_gather:
            seconds = max(0.0, seconds - hidden_forward)
        elif traffic.kind.startswith(("dp_", "edp_")) and ddp.overlap_grad_reduce:
            seconds = max(0.0, seconds - hidden_backward)
        exposed += seconds
    return exposed


def _optimizer_time(group: RankPlan, gpu: Gpu) -> float:
    state = group.state
    touched = 2 * state.optimizer_bytes + state.gradient_bytes + state.parameter_bytes
    return touched / gpu.memory_bandwidth


def _bandwidth(gpu: Gpu, traffic: Traffic) -> float:
    """Return bytes a second of one rank in a group.

    A ring that crosses machines uses the network cards of all its ranks in a machine; an exchange
    between pairs has its own card alone.
    """
    if traffic.span <= gpu.per_machine:
        return gpu.link_bandwidth * LINK_EFFICIENCY
    together = 1
    if not traffic.kind.endswith(_ALL_TO_ALL):
        together = max(1, gpu.per_machine * traffic.ranks // traffic.span)
    return min(gpu.link_bandwidth, gpu.network_bandwidth * together) * LINK_EFFICIENCY


def _rate(config: ConfigContainer, gpu: Gpu) -> float:
    return gpu.single_flops if parameter_bytes(config) == 4 else gpu.half_flops
