# SPDX-License-Identifier: Apache-2.0
"""Bytes of parameters, gradients and optimizer state of one rank.

Source: megatron-core 0.16.1. Gradients live in the buffers of ``DistributedDataParallel`` and are
never freed. Adam keeps two moments an element, and with 16-bit parameters a float32 copy of them
(``Float16OptimizerWithFloat16Params``, ``DistributedOptimizer``). Torch's step counters, 4 bytes a
parameter tensor, are not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen
from mb_config.pipeline import stage_chunks

from mb_engine.plan.buffers import GradientBuffer, gradient_buffer
from mb_engine.plan.extras import is_muon_matrix, optimizer_share
from mb_engine.plan.parameters import chunk_parameters
from mb_engine.plan.sharded import ShardedBuffer, sharded_buffers

if TYPE_CHECKING:
    from mb_config import ConfigContainer

    from mb_engine.plan.layout import Degrees, Place
    from mb_engine.plan.parameters import Parameter

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
_SMALLEST_BUCKET = 40_000_000
_BUCKET_A_REPLICA = 1_000_000


@frozen(kw_only=True)
class StateMemory:
    """What a rank holds from the first step to the last.

    Attributes:
        parameters: Elements on this rank.
        parameter_bytes: Their bytes, without padding.
        gradient_bytes: Bytes of gradients, without padding.
        optimizer_bytes: Bytes of moments and float32 main parameters.
        padding_bytes: Unused bytes in the buffers of gradients, and with the distributed optimizer
            of parameters.
    """

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    padding_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them together."""
        return (
            self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.padding_bytes
        )


@frozen(kw_only=True)
class StageState:
    """Parameters and buffers of one pipeline stage, from which each of its ranks follows.

    Attributes:
        parameters: Of each model chunk.
        dense: Gradient buffers reduced over data- and context-parallel ranks.
        expert: Gradient buffers reduced over expert-data-parallel ranks.
        dense_replicas: Ranks that share the state of *dense*.
        expert_replicas: Ranks that share the state of *expert*.
        sharded: Megatron-FSDP's buffers, in place of *dense* and *expert*.
    """

    parameters: tuple[tuple[Parameter, ...], ...]
    dense: tuple[GradientBuffer, ...]
    expert: tuple[GradientBuffer, ...]
    dense_replicas: int
    expert_replicas: int
    sharded: tuple[ShardedBuffer, ...] = ()

    def parts(self, place: Place) -> tuple[int, int]:
        """Return which part of the dense and of the expert state the rank at *place* owns."""
        return place.replica % self.dense_replicas, place.expert_replica % self.expert_replicas


def stage_state(
    config: ConfigContainer, degrees: Degrees, *, pp_rank: int, spec: str
) -> StageState:
    """Return parameters and buffers of one pipeline stage.

    Args:
        config: Resolved.
        degrees: Of the job.
        pp_rank: The stage.
        spec: ``"torch"`` or ``"te"``.
    """
    instances = config.ddp.num_distributed_optimizer_instances
    replicas = degrees.dp * degrees.cp // instances
    expert_replicas = max(1, degrees.edp // instances)
    chunks: list[tuple[Parameter, ...]] = []
    dense: list[GradientBuffer] = []
    expert: list[GradientBuffer] = []
    sharded: list[ShardedBuffer] = []
    for chunk, held in enumerate(stage_chunks(config.model)[pp_rank]):
        found = tuple(chunk_parameters(config.model, degrees, held, spec=spec))
        chunks.append(found)
        if config.ddp.use_megatron_fsdp:
            sharded += sharded_buffers(
                found,
                replicas=replicas,
                expert_replicas=expert_replicas,
                by_layer=config.ddp.data_parallel_sharding_strategy == "optim_grads_params",
                bucket_size=config.ddp.bucket_size,
            )
            continue
        for wanted, shared_by, buffers in (
            (False, replicas, dense),
            (True, expert_replicas, expert),
        ):
            mine = [p for p in found if p.expert == wanted]
            if mine:
                buffers.append(
                    gradient_buffer(
                        mine,
                        distributed=bool(config.ddp.use_distributed_optimizer),
                        replicas=shared_by,
                        bucket_size=_bucket_size(config, degrees, pp_rank=pp_rank, chunk=chunk),
                        for_busy_links=config.ddp.pad_buckets_for_high_nccl_busbw,
                    )
                )
    return StageState(
        parameters=tuple(chunks),
        dense=tuple(dense),
        expert=tuple(expert),
        dense_replicas=replicas,
        expert_replicas=expert_replicas,
        sharded=tuple(sharded),
    )


def state_memory(config: ConfigContainer, state: StageState, parts: tuple[int, int]) -> StateMemory:
    """Return the bytes that one rank of a stage holds.

    Args:
        config: Resolved.
        state: Of the rank's stage.
        parts: From :meth:`StageState.parts`.
    """
    if state.sharded:
        return _sharded_memory(config, state, parts)
    distributed = bool(config.ddp.use_distributed_optimizer)
    parameter, gradient = parameter_bytes(config), gradient_bytes(config)
    buffers = (*state.dense, *state.expert)
    elements = sum(b.used for b in buffers)
    padding = sum(b.elements for b in buffers) - elements
    owned = elements
    if distributed:
        owned = sum(b.owned(parts[0], state.dense_replicas) for b in state.dense)
        owned += sum(b.owned(parts[1], state.expert_replicas) for b in state.expert)
    held = owned * optimizer_bytes_per_element(config)
    if config.optimizer.optimizer == "muon":
        matrices = sum(p.size for c in state.parameters for p in c if is_muon_matrix(p))
        held -= matrices * BYTES["float32"] * owned // elements
    return StateMemory(
        parameters=elements,
        parameter_bytes=elements * parameter,
        gradient_bytes=elements * gradient,
        optimizer_bytes=int(held * optimizer_share(config)),
        padding_bytes=padding * (gradient + (parameter if distributed else 0)),
    )


def _sharded_memory(
    config: ConfigContainer, state: StageState, parts: tuple[int, int]
) -> StateMemory:
    """Return what a rank holds with Megatron-FSDP, outside of the layers that it gathers."""
    strategy = config.ddp.data_parallel_sharding_strategy
    parameter, gradient = parameter_bytes(config), gradient_bytes(config)
    main = BYTES["float32"] if parameter < BYTES["float32"] else 0
    moments = optimizer_bytes_per_element(config) - main
    held = {"parameters": 0, "gradients": 0, "owned": 0, "padding": 0}
    for buffer in state.sharded:
        mine, share = buffer.owned(parts[buffer.expert]), buffer.elements // buffer.replicas
        held["owned"] += mine
        held["padding"] += (share - mine) * main
        for name, element, spread in (
            ("parameters", parameter, strategy == "optim_grads_params"),
            ("gradients", gradient, strategy in {"optim_grads", "optim_grads_params"}),
        ):
            used = mine if spread else buffer.used
            held[name] += used
            held["padding"] += ((share if spread else buffer.elements) - used) * element
    return StateMemory(
        parameters=held["parameters"],
        parameter_bytes=held["parameters"] * parameter,
        gradient_bytes=held["gradients"] * gradient,
        optimizer_bytes=held["owned"] * (main + moments),
        padding_bytes=held["padding"],
    )


def parameter_bytes(config: ConfigContainer) -> int:
    """Return the bytes of one parameter element, which is also that of an activation."""
    return 2 if config.model.bf16 or config.model.fp16 else 4


def gradient_bytes(config: ConfigContainer) -> int:
    """Return the bytes of one element of the gradient buffers."""
    return 4 if config.ddp.grad_reduce_in_fp32 else parameter_bytes(config)


def optimizer_bytes_per_element(config: ConfigContainer) -> int:
    """Return the bytes that the optimizer keeps for one element that it owns."""
    optimizer = config.optimizer
    half = parameter_bytes(config) < BYTES["float32"]
    if optimizer.optimizer == "sgd":
        moments = BYTES["float32"] if optimizer.sgd_momentum else 0
        return moments + (BYTES["float32"] if half else 0)
    moments = BYTES[optimizer.exp_avg_dtype] + BYTES[optimizer.exp_avg_sq_dtype]
    if not half:
        return moments
    main = BYTES[optimizer.main_params_dtype]
    return moments + main


def _bucket_size(
    config: ConfigContainer, degrees: Degrees, *, pp_rank: int, chunk: int
) -> int | None:
    """Return the size after which a bucket ends: there are several only where it helps overlap."""
    unneeded = pp_rank > 0 or chunk > 0 or not config.ddp.overlap_grad_reduce
    if unneeded or config.optimizer.overlap_param_gather_with_optimizer_step:
        return None
    default = max(_SMALLEST_BUCKET, _BUCKET_A_REPLICA * degrees.dp)
    return config.ddp.bucket_size or default
