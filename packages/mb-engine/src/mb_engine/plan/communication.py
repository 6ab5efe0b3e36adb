# SPDX-License-Identifier: Apache-2.0
"""Bytes that one rank sends in one step, by kind.

Counted as in ring algorithms, which send the least: an all-gather or reduce-scatter of N bytes over
n ranks sends ``N (n - 1) / n`` from each rank, an all-reduce twice that, an all-to-all of N bytes a
rank ``N (n - 1) / n``.

Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2 (tensor and sequence parallelism);
Narayanan et al. 2021, arXiv:2104.04473, section 3.2 (pipeline); the collectives of megatron-core
0.16.1 and of this package's attention, which the tests count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen
from mb_config.pipeline import stage_chunks

from mb_engine.plan.layout import (
    exchange,
    expert_layers,
    ring_share,
)
from mb_engine.plan.memory import BYTES, gradient_bytes, parameter_bytes
from mb_engine.plan.sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import ConfigContainer
    from mb_config.sections.model import ModelConfig

    from mb_engine.plan.layout import Degrees
    from mb_engine.plan.memory import StageState

_LOSS_REDUCTIONS = 3


@frozen(kw_only=True)
class Traffic:
    """What a rank sends to its group in one step.

    Attributes:
        kind: Such as ``"sp_all_gather"``; the axis comes first.
        sent_bytes: Bytes that this rank sends.
        ranks: Size of the group.
        span: Distance between the first and last rank of a group, plus one: groups wider than a
            machine cross its border.
    """

    kind: str
    sent_bytes: float
    ranks: int
    span: int


def step_traffic(
    config: ConfigContainer, degrees: Degrees, state: StageState, *, pp_rank: int, spec: str
) -> tuple[Traffic, ...]:
    """Return what a rank of one pipeline stage sends in a step.

    Args:
        config: Resolved.
        degrees: Of the job.
        state: Of the stage.
        pp_rank: The stage.
        spec: ``"torch"`` or ``"te"``.
    """
    sizes = Sizes.from_config(config, degrees)
    count = config.train.num_microbatches or 1
    sums: dict[tuple[str, str], float] = {}
    for axis, kind, sent in _of_microbatch(config, degrees, sizes, pp_rank=pp_rank, spec=spec):
        sums[axis, kind] = sums.get((axis, kind), 0.0) + sent * count
    for axis, kind, sent in _of_step(config, degrees, state):
        sums[axis, kind] = sums.get((axis, kind), 0.0) + sent
    groups = _groups(degrees)
    return tuple(
        Traffic(kind=kind, sent_bytes=sent, ranks=groups[axis][0], span=groups[axis][1])
        for (axis, kind), sent in sums.items()
        if sent
    )


def _groups(degrees: Degrees) -> dict[str, tuple[int, int]]:
    """Return size and span of the groups along each axis."""
    d = degrees
    replica = d.tp * d.cp
    data = d.world if d.pipeline_before_data else replica * d.dp
    expert_data = d.world if d.pipeline_before_data else d.etp * d.ep * d.edp
    return {
        "tp": (d.tp, d.tp),
        "cp": (d.cp, replica),
        "dp": (d.dp * d.cp, data),
        "pp": (d.pp, replica * d.pp if d.pipeline_before_data else d.world),
        "ep": (d.ep, d.etp * d.ep),
        "etp": (d.etp, d.etp),
        "edp": (d.edp, expert_data),
    }


def _of_microbatch(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, pp_rank: int, spec: str
) -> Iterator[tuple[str, str, float]]:
    """Yield axis, kind and bytes of forward and backward of one micro-batch."""
    model = config.model
    again = config.recompute.recompute_granularity == "full"
    experts = expert_layers(model)
    for held in stage_chunks(model)[pp_rank]:
        first, last = held.embedding, held.loss
        if degrees.tp > 1:
            yield from _ends(config, degrees, sizes, first=first, last=last)
        if degrees.pp > 1:
            wire = BYTES[model.pipeline_dtype or "float32"] / sizes.element
            yield "pp", "pp_p2p", (2 - first - last) * sizes.spread_hidden * wire
        repeated = _repeated_layers(config, len(held.layers)) if again else 0
        for position, index in enumerate(held.layers):
            recomputed = position < repeated
            yield from _tensor_parallel(
                config, degrees, sizes, experts=experts[index], recomputed=recomputed
            )
            yield from _context_parallel(model, degrees, sizes, recomputed=recomputed, spec=spec)
            if experts[index]:
                yield from _dispatch(model, degrees, sizes, recomputed=recomputed)


def _repeated_layers(config: ConfigContainer, layers: int) -> int:
    if config.recompute.recompute_method == "uniform":
        return layers
    return min(layers, config.recompute.recompute_num_layers or 0)


def _ends(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, first: bool, last: bool
) -> Iterator[tuple[str, str, float]]:
    """Yield what embedding, output layer and loss send."""
    share = ring_share(degrees.tp) * sizes.hidden
    if config.model.sequence_parallel:
        yield "tp", "sp_reduce_scatter", share * (first + last)
        yield "tp", "sp_all_gather", share * (first + 2 * last)
    else:
        yield "tp", "tp_all_reduce", 2 * share * (first + last)
    if last:
        loss = _LOSS_REDUCTIONS * sizes.tokens * 4
        yield "tp", "tp_all_reduce", 2 * ring_share(degrees.tp) * loss


def _tensor_parallel(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, experts: bool, recomputed: bool
) -> Iterator[tuple[str, str, float]]:
    """Yield what the two halves of a layer send among tensor-parallel ranks.

    Without sequence parallelism each half all-reduces its output forward and its input's gradient
    backward. With it, a half gathers its input forward and again backward, for the gradient of its
    weights, and gathers its output's gradient; it scatters its output and its input's gradient.
    """
    if degrees.tp == 1:
        return
    shared = bool(config.model.moe_shared_expert_intermediate_size)
    halves = 2 if not experts or shared else 1
    share = ring_share(degrees.tp) * sizes.hidden * halves
    if config.model.sequence_parallel:
        yield "tp", "sp_all_gather", share * (4 if recomputed else 3)
        yield "tp", "sp_reduce_scatter", share * (3 if recomputed else 2)
    else:
        yield "tp", "tp_all_reduce", 2 * share * (3 if recomputed else 2)


def _context_parallel(
    model: ModelConfig, degrees: Degrees, sizes: Sizes, *, recomputed: bool, spec: str
) -> Iterator[tuple[str, str, float]]:
    """Yield what the attention of one layer sends among context-parallel ranks."""
    cp = degrees.cp
    if cp == 1:
        return
    kind = exchange(model)
    forwards = 2 if recomputed else 1
    keys_and_values = float(sizes.key + sizes.value)
    if kind == "all_gather":
        # Transformer Engine gathers again for the backward pass.
        gathers = forwards + (1 if spec == "te" else 0)
        yield "cp", "cp_all_gather", (cp - 1) * keys_and_values * gathers
        yield "cp", "cp_reduce_scatter", (cp - 1) * keys_and_values
        return
    by_heads, ring = _levels(model, kind, cp)
    if by_heads > 1:
        all_of_it = sizes.query + sizes.attended + keys_and_values
        yield "cp", "cp_all_to_all", ring_share(by_heads) * all_of_it * (forwards + 1)
    if ring > 1:
        keys_and_values = 2.0 * sizes.key  # values are as wide as keys on the way
        # Backward, keys and values go round once more, and their gradients all the way home; the
        # torch layers sum these in float32.
        gradients = keys_and_values * (BYTES["float32"] / sizes.element if spec == "torch" else 1)
        yield "cp", "cp_p2p", keys_and_values * (ring - 1) * (forwards + 1) + gradients * ring


def _levels(model: ModelConfig, kind: str, cp: int) -> tuple[int, int]:
    """Return how many ranks exchange heads, and how many pass keys and values round."""
    if kind == "a2a":
        return cp, 1
    if kind == "a2a+p2p" and model.hierarchical_context_parallel_sizes:
        inner = model.hierarchical_context_parallel_sizes[0]
        return inner, cp // inner
    return 1, cp


def _dispatch(
    model: ModelConfig, degrees: Degrees, sizes: Sizes, *, recomputed: bool
) -> Iterator[tuple[str, str, float]]:
    """Yield what sending tokens to experts and back takes, forward and backward."""
    forwards = 2 if recomputed else 1
    row = model.hidden_size * sizes.element
    if model.moe_token_dispatcher_type == "allgather":  # noqa: S105 - no password
        ranks, experts = degrees.ep * degrees.etp, model.num_moe_experts or 0
        sent = (ranks - 1) * sizes.spread_tokens
        # Beside the tokens, who goes where and with which weight.
        weights = experts * sizes.element
        forward = row + weights + experts
        yield "ep", "ep_all_gather", sent * (forward * forwards + row)
        yield "ep", "ep_reduce_scatter", sent * (row * forwards + row + weights)
        return
    times = 2 * (forwards + 1)
    routed = sizes.spread_tokens * model.moe_router_topk * row
    weights = sizes.spread_tokens * model.moe_router_topk * sizes.element
    sent = routed * times + weights * (forwards + 1)
    yield "ep", "ep_all_to_all", ring_share(degrees.ep) * sent
    gathered = ring_share(degrees.etp) * routed * degrees.etp
    yield "etp", "etp_all_gather", gathered * times / 2
    yield "etp", "etp_reduce_scatter", gathered * times / 2


def _of_step(
    config: ConfigContainer, degrees: Degrees, state: StageState
) -> Iterator[tuple[str, str, float]]:
    """Yield what gradients and parameters send once a step."""
    gradient = gradient_bytes(config)
    if state.sharded:
        yield from _sharded(config, state)
    for axis, buffers, ranks in (
        ("dp", state.dense, state.dense_replicas),
        ("edp", state.expert, state.expert_replicas),
    ):
        elements = sum(b.elements for b in buffers)
        yield from _replicas(config, axis, elements, ranks)
    parameters = [p for chunk in state.parameters for p in chunk]
    if degrees.tp > 1 and config.model.sequence_parallel:
        whole = sum(p.size for p in parameters if p.replicated)
        yield "tp", "tp_gradient", 2 * ring_share(degrees.tp) * whole * gradient
    tied = sum(p.size for p in parameters if p.tied)
    # Between the first and the last stage alone.
    yield "pp", "tied_embedding", 2 * ring_share(2) * tied * gradient


def _sharded(config: ConfigContainer, state: StageState) -> Iterator[tuple[str, str, float]]:
    """Yield what Megatron-FSDP sends: parameters of layers as they are needed, gradients."""
    strategy = config.ddp.data_parallel_sharding_strategy
    count = config.train.num_microbatches or 1
    again = 1 if config.recompute.recompute_granularity == "full" else 0
    for buffer in state.sharded:
        axis = "edp" if buffer.expert else "dp"
        share = ring_share(buffer.replicas) * buffer.elements
        # Gathered for the forward and for the backward pass, or once after the optimizer's step.
        gathers = count * (2 + again) if strategy == "optim_grads_params" and buffer.unit else 1
        scatters = 1 if strategy == "optim" else count
        yield axis, f"{axis}_gradient_reduce_scatter", share * scatters * gradient_bytes(config)
        yield axis, f"{axis}_parameter_all_gather", share * gathers * parameter_bytes(config)


def _replicas(
    config: ConfigContainer, axis: str, elements: int, ranks: int
) -> Iterator[tuple[str, str, float]]:
    gradient, parameter = gradient_bytes(config), parameter_bytes(config)
    share = ring_share(ranks) * elements
    if not config.ddp.use_distributed_optimizer:
        yield axis, f"{axis}_gradient_all_reduce", 2 * share * gradient
        return
    yield axis, f"{axis}_gradient_reduce_scatter", share * gradient
    yield axis, f"{axis}_parameter_all_gather", share * parameter
    copies = config.ddp.num_distributed_optimizer_instances
    part = elements / ranks * gradient
    yield axis, f"{axis}_gradient_all_reduce", 2 * ring_share(copies) * part
