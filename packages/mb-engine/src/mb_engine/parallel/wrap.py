# SPDX-License-Identifier: Apache-2.0
"""Data parallelism around the model chunks of a rank: megatron-core's own wrapper, wired up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from mb_config import ConfigContainer
    from torch import nn


def wrap_data_parallel(config: ConfigContainer, chunks: list[nn.Module]) -> list[Any]:
    """Return *chunks* wrapped in a :class:`BufferedDataParallel` or ``FullyShardedChunk`` each.

    Every field of ``config.ddp`` whose name megatron-core knows is passed on. Buckets after the
    first chunk are merged, as nothing is left to overlap them with.

    Raises:
        EngineError: If Megatron-FSDP is asked for and cannot run here.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.utils import get_model_config

    if config.ddp.use_megatron_fsdp:
        from mb_engine.parallel.fully_sharded import fully_sharded

        return [fully_sharded(config, chunk) for chunk in chunks]

    from mb_engine.parallel.gradient_buffer import BufferedDataParallel

    known = DistributedDataParallelConfig.__dataclass_fields__
    values = attrs.asdict(config.ddp, recurse=False)
    values["delay_wgrad_compute"] = config.comm_overlap.delay_wgrad_compute
    values["fp4_param_gather"] = bool(getattr(config.mixed_precision, "fp4_param", False))
    ddp_config = DistributedDataParallelConfig(**{k: v for k, v in values.items() if k in known})
    wrapped = [
        BufferedDataParallel(
            config=get_model_config(chunk),
            ddp_config=ddp_config,
            module=chunk,
            disable_bucketing=index > 0
            or bool(config.optimizer.overlap_param_gather_with_optimizer_step),
        )
        for index, chunk in enumerate(chunks)
    ]
    if config.rng.data_parallel_random_init:
        for chunk in wrapped:
            chunk.broadcast_params()
    return wrapped


def unwrapped(chunk: Any) -> nn.Module:
    """Return the model chunk inside a data-parallel wrapper."""
    inner: nn.Module = chunk.chunk if hasattr(chunk, "param_and_grad_buffer") else chunk.module
    return inner


def connect_schedule(config: ConfigContainer, chunks: list[Any], optimizer: Any) -> None:
    """Give megatron-core's schedule the hooks by which it overlaps communication with compute."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    from mb_engine.parallel.gradient_buffer import finalize_data_parallel

    model_config = get_model_config(chunks[0])
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.finalize_model_grads_func = (
        finalize_data_parallel if _is_data_parallel(model_config) else finalize_model_grads
    )
    ddp = config.ddp

    def per_chunk(name: str) -> Any:
        hooks = [getattr(chunk, name) for chunk in chunks]
        return hooks[0] if len(hooks) == 1 else hooks

    if ddp.overlap_grad_reduce:
        model_config.no_sync_func = per_chunk("no_sync")
        model_config.grad_sync_func = per_chunk("start_grad_sync")
    if ddp.overlap_param_gather and ddp.align_param_gather:
        model_config.param_sync_func = per_chunk("start_param_sync")


def _is_data_parallel(model_config: Any) -> bool:
    """Return whether gradients need nothing but a sum over data-parallel ranks."""
    degrees = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    # Of megatron-core 0.19: weights split over replicas.
    degrees_of_replicas = ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")
    return (
        all(getattr(model_config, name) == 1 for name in degrees)
        and all(getattr(model_config, name, 1) in {0, 1} for name in degrees_of_replicas)
        and model_config.num_moe_experts is None
        and not getattr(model_config, "flextron", False)
    )
