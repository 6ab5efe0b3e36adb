# SPDX-License-Identifier: Apache-2.0
"""Data parallelism around the model chunks of a rank: megatron-core's own wrapper, wired up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from mb_config import ConfigContainer
    from torch import nn


def wrap_data_parallel(config: ConfigContainer, chunks: list[nn.Module]) -> list[Any]:
    """Return *chunks* wrapped in megatron-core's ``DistributedDataParallel``.

    Every field of ``config.ddp`` whose name megatron-core knows is passed on. Buckets after the
    first chunk are merged, as nothing is left to overlap them with.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.utils import get_model_config

    known = DistributedDataParallelConfig.__dataclass_fields__
    values = attrs.asdict(config.ddp, recurse=False)
    ddp_config = DistributedDataParallelConfig(**{k: v for k, v in values.items() if k in known})
    wrapped = [
        DistributedDataParallel(
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


def connect_schedule(config: ConfigContainer, chunks: list[Any], optimizer: Any) -> None:
    """Give megatron-core's schedule the hooks by which it overlaps communication with compute."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    model_config = get_model_config(chunks[0])
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.finalize_model_grads_func = finalize_model_grads
    ddp = config.ddp

    def per_chunk(name: str) -> Any:
        hooks = [getattr(chunk, name) for chunk in chunks]
        return hooks[0] if len(hooks) == 1 else hooks

    if ddp.overlap_grad_reduce:
        model_config.no_sync_func = per_chunk("no_sync")
        model_config.grad_sync_func = per_chunk("start_grad_sync")
    if ddp.overlap_param_gather and ddp.align_param_gather:
        model_config.param_sync_func = per_chunk("start_param_sync")
