# SPDX-License-Identifier: Apache-2.0
"""The plan of a job: what each of its ranks holds, computes and sends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen
from mb_config.errors import ConfigError, Violation
from mb_config.pipeline import stage_chunks as chunks_of_stages

from mb_engine.plan.activations import ChunkActivations, chunk_activations
from mb_engine.plan.communication import Traffic, step_traffic
from mb_engine.plan.compute import flops_per_step, forward_flops_by_stage
from mb_engine.plan.extras import extra_bytes, notes
from mb_engine.plan.hardware import Gpu, gpu_named
from mb_engine.plan.layout import Degrees
from mb_engine.plan.memory import (
    BYTES,
    StageState,
    StateMemory,
    gradient_bytes,
    optimizer_bytes_per_element,
    parameter_bytes,
    stage_state,
    state_memory,
)
from mb_engine.plan.pipeline import activation_peak, bubble_fraction, passes
from mb_engine.plan.refusals import refuse_unknown
from mb_engine.plan.sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config import ConfigContainer

    from mb_engine.plan.activations import DeviceType

_BYTE_TOKENS = 257
_FORWARD_AND_BACKWARD = 3
_FULL = 4


@frozen(kw_only=True)
class RankPlan:
    """What equal ranks of one pipeline stage hold, compute and send in a step.

    Attributes:
        ranks: Global ranks, ascending.
        pp_rank: Their pipeline stage.
        layers: Transformer layers on it.
        state: Parameters, gradients and optimizer state.
        activation_bytes: Most bytes kept for backward passes at once.
        activations_by_part: Bytes that one micro-batch keeps, by part of the model.
        working_bytes: Estimate of what running kernels need beside all that: gradients of
            activations, logits, the gradient of a weight; or the optimizer's temporaries if more.
        extra_bytes: Low-precision copies of weights and buffers of CUDA graphs.
        traffic: Bytes sent in a step, by kind.
        model_flops: Operations of a step, forward and backward, without recomputation.
    """

    ranks: tuple[int, ...]
    pp_rank: int
    layers: int
    state: StateMemory
    activation_bytes: float
    activations_by_part: Mapping[str, float]
    working_bytes: float
    extra_bytes: float
    traffic: tuple[Traffic, ...]
    model_flops: float

    @property
    def peak_bytes(self) -> float:
        """Most bytes of tensors at once, as ``torch.cuda.max_memory_allocated`` counts them."""
        state = self.state.total_bytes + self.extra_bytes
        return state + self.activation_bytes + self.working_bytes


@frozen(kw_only=True)
class Plan:
    """What a job will need.

    Attributes:
        config: The configuration, resolved for the job.
        degrees: How its ranks are divided.
        layer_spec: ``"torch"`` or ``"te"``: whose tensors are counted.
        device: ``"cuda"`` or ``"cpu"``.
        gpu: What the job is to fit, None if not asked.
        groups: Ranks with equal numbers, by first rank.
        bubble_fraction: Idle part of a step of the pipeline.
        model_flops: Operations of a step over all ranks, without recomputation.
    """

    config: ConfigContainer
    degrees: Degrees
    layer_spec: str
    device: str
    gpu: Gpu | None
    groups: tuple[RankPlan, ...]
    bubble_fraction: float
    model_flops: float

    @property
    def peak_bytes(self) -> float:
        """Peak memory of the fullest rank."""
        return max(group.peak_bytes for group in self.groups)

    @property
    def fits(self) -> bool | None:
        """Whether every rank fits the GPU; None without one."""
        return None if self.gpu is None else self.peak_bytes <= self.gpu.usable_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What in the numbers was not measured, a line each."""
        return tuple(notes(self.config))

    def rank(self, rank: int) -> RankPlan:
        """Return the plan of one rank.

        Raises:
            LookupError: If the job has no such rank.
        """
        for group in self.groups:
            if rank in group.ranks:
                return group
        raise LookupError(f"rank={rank}: the job has ranks 0 to {self.degrees.world - 1}")


def plan(config: ConfigContainer, *, world_size: int, gpu: str | Gpu | None = None) -> Plan:
    """Return what a job will need, from its configuration alone.

    Neither torch nor megatron-core is imported and nothing is built.

    Args:
        config: Resolved or not.
        world_size: Ranks of the job.
        gpu: Which GPU it is to fit, by name or as a record; with one, kernels are CUDA's even where
            ``dist.device`` is ``cpu``.

    Raises:
        ConfigError: If the configuration does not fit the job, or asks for what is not modelled.
        EngineError: If there is no GPU of that name.
    """
    found = gpu_named(gpu) if isinstance(gpu, str) else gpu
    resolved = with_vocabulary(config).finalize(world_size)
    refuse_unknown(resolved)
    return plan_resolved(resolved, gpu=found)


def plan_resolved(config: ConfigContainer, *, gpu: Gpu | None) -> Plan:
    """Return the plan of a configuration that is resolved and known to be modelled."""
    degrees = Degrees.from_config(config)
    device: DeviceType = "cpu" if config.dist.device == "cpu" and gpu is None else "cuda"
    spec = layer_spec(config, device)
    return Plan(
        config=config,
        degrees=degrees,
        layer_spec=spec,
        device=device,
        gpu=gpu,
        groups=_groups(config, degrees, spec, device),
        bubble_fraction=bubble_fraction(degrees, config.train.num_microbatches or 1),
        model_flops=flops_per_step(config),
    )


def layer_spec(config: ConfigContainer, device: DeviceType) -> str:
    """Return the layer spec whose tensors count; ``auto`` is te on CUDA, as where it is installed."""
    if config.model.layer_spec != "auto":
        return config.model.layer_spec
    return "te" if device == "cuda" else "torch"


def with_vocabulary(config: ConfigContainer) -> ConfigContainer:
    """Return *config* with the size of its vocabulary, where no tokenizer has to be loaded for it.

    Raises:
        ConfigError: If only the tokenizer's files say it.
    """
    if config.model.vocab_size is not None or config.tokenizer.tokenizer_type == "null":
        return config
    if config.tokenizer.tokenizer_type == "bytes":
        return config.override(f"model.vocab_size={_BYTE_TOKENS}")
    rule = Violation(
        field="model.vocab_size",
        value="None",
        rule="a plan is made without loading the tokenizer, which would tell",
        remedy="give model.vocab_size",
    )
    raise ConfigError.from_violations([rule])


def _groups(
    config: ConfigContainer, degrees: Degrees, spec: str, device: DeviceType
) -> tuple[RankPlan, ...]:
    stages = [
        _stage(config, degrees, pp_rank=pp_rank, spec=spec, device=device)
        for pp_rank in range(degrees.pp)
    ]
    memories: dict[tuple[int, tuple[int, int]], StateMemory] = {}
    members: dict[tuple[int, StateMemory], list[int]] = {}
    for rank in range(degrees.world):
        place = degrees.place(rank)
        state = stages[place.pp_rank][0]
        key = place.pp_rank, state.parts(place)
        if key not in memories:
            memories[key] = state_memory(config, state, key[1])
        members.setdefault((place.pp_rank, memories[key]), []).append(rank)
    forward = forward_flops_by_stage(config.model)
    counts = [sum(len(c.layers) for c in stage) for stage in chunks_of_stages(config.model)]
    sizes = Sizes.from_config(config, degrees)
    count = config.train.num_microbatches or 1
    tokens = sizes.tokens * count
    found = []
    for (pp_rank, memory), ranks in members.items():
        state, chunks, traffic = stages[pp_rank]
        activations = stage_activations(config, degrees, chunks, pp_rank)
        found.append(
            RankPlan(
                ranks=tuple(ranks),
                pp_rank=pp_rank,
                layers=counts[pp_rank],
                state=memory,
                activation_bytes=activations,
                activations_by_part=_sum_parts(chunks),
                working_bytes=_working(
                    config, degrees, state, memory, activations, spec=spec, device=device
                ),
                extra_bytes=extra_bytes(
                    config,
                    [p for chunk in state.parameters for p in chunk],
                    sizes,
                    layers=counts[pp_rank],
                ),
                traffic=traffic,
                model_flops=_FORWARD_AND_BACKWARD * forward[pp_rank] * tokens / degrees.tp,
            )
        )
    return tuple(sorted(found, key=lambda group: group.ranks[0]))


def _stage(
    config: ConfigContainer, degrees: Degrees, *, pp_rank: int, spec: str, device: DeviceType
) -> tuple[StageState, list[ChunkActivations], tuple[Traffic, ...]]:
    state = stage_state(config, degrees, pp_rank=pp_rank, spec=spec)
    chunks = stage_chunks(config, degrees, pp_rank, spec, device)
    return state, chunks, step_traffic(config, degrees, state, pp_rank=pp_rank, spec=spec)


def stage_chunks(
    config: ConfigContainer, degrees: Degrees, pp_rank: int, spec: str, device: DeviceType
) -> list[ChunkActivations]:
    """Return what one micro-batch keeps in each model chunk of a stage."""
    return [
        chunk_activations(config, degrees, pp_rank=pp_rank, chunk=chunk, spec=spec, device=device)
        for chunk in range(degrees.vpp)
    ]


def stage_activations(
    config: ConfigContainer, degrees: Degrees, chunks: list[ChunkActivations], pp_rank: int
) -> float:
    """Return the most bytes of activations that a rank of a stage holds at once."""
    schedule = passes(
        degrees,
        pp_rank=pp_rank,
        # By then the pipeline is full and repeats itself.
        num_microbatches=min(config.train.num_microbatches or 1, _FULL * degrees.pp),
        extra_warmup=int(config.comm_overlap.overlap_moe_expert_parallel_comm),
    )
    return activation_peak(chunks, schedule)


def _sum_parts(chunks: list[ChunkActivations]) -> dict[str, float]:
    parts: dict[str, float] = {}
    for chunk in chunks:
        for name, size in chunk.by_part.items():
            parts[name] = parts.get(name, 0.0) + size
    return parts


def _working(
    config: ConfigContainer,
    degrees: Degrees,
    state: StageState,
    memory: StateMemory,
    activations: float,
    *,
    spec: str,
    device: DeviceType,
) -> float:
    """Estimate what kernels need beside what is kept.

    In the backward pass: the gradient of the largest weight, before it is added to its buffer;
    gradients of the MLP's inner activations and of the residual stream; and at the loss the logits,
    which exist in 16 bits beside float32. In the optimizer's step: float32 copies of gradients that
    are reduced in 16 bits, and with torch's Adam on CUDA a list of temporaries as large as a
    moment. Activations are gone by then.
    """
    model, sizes = config.model, Sizes.from_config(config, degrees)
    parameters = [p for chunk in state.parameters for p in chunk]
    weight = max(p.size for p in parameters) * sizes.element
    inner = sizes.tokens * (model.ffn_hidden_size or 0) // degrees.tp * sizes.element
    widths = 2 if model.gated_linear_unit else 1
    layer = (widths + 1) * inner + 2 * sizes.hidden
    logits = 0.0
    if any(p.name == "output_layer.weight" for p in parameters) or degrees.pp == 1:
        vocabulary = (model.padded_vocab_size or 0) // degrees.tp
        copies = sizes.element if sizes.element < BYTES["float32"] else 0
        logits = sizes.tokens * vocabulary * copies
    backward = weight + max(layer, logits) + _gathered(config, state)
    owned = memory.optimizer_bytes / max(1, optimizer_bytes_per_element(config)) * BYTES["float32"]
    update = 0.0
    if gradient_bytes(config) < BYTES["float32"]:
        update += owned
    if spec == "torch" and device == "cuda" and config.optimizer.optimizer == "adam":
        update += owned
    return max(backward, update - activations)


def _gathered(config: ConfigContainer, state: StageState) -> float:
    """Return the bytes of what Megatron-FSDP gathers: two layers and all that is in none."""
    if config.ddp.data_parallel_sharding_strategy != "optim_grads_params":
        return 0.0
    layer = max((b.elements for b in state.sharded if b.unit), default=0)
    others = sum(b.elements for b in state.sharded if not b.unit)
    return (2 * layer + others) * parameter_bytes(config) + layer * gradient_bytes(config)
