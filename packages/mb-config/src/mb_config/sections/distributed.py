# SPDX-License-Identifier: Apache-2.0
"""Process groups and data parallelism."""

from __future__ import annotations

from typing import Literal

from attrs import define, field

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class DistributedInitConfig:
    """How processes find each other and on what they compute.

    Attributes:
        device: auto takes CUDA where there is one.
        distributed_backend: null means nccl on CUDA, gloo on CPU.
        distributed_timeout_minutes: Minutes after which a hanging collective fails.
        use_tp_pp_dp_mapping: Order ranks tensor, pipeline, data instead of tensor, data, pipeline.
        use_gloo_process_groups: Make gloo groups beside the NCCL ones.
        nccl_communicator_config_path: YAML file with settings of NCCL communicators.
        high_priority_stream_groups: Groups whose NCCL stream has high priority.
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    distributed_backend: Literal["nccl", "gloo"] | None = None
    distributed_timeout_minutes: float = number(10.0, gt=0)
    use_tp_pp_dp_mapping: bool = False
    use_gloo_process_groups: bool = True
    nccl_communicator_config_path: str | None = None
    high_priority_stream_groups: list[str] = field(factory=list)

    __attrs_post_init__ = check_all
    __repr__ = concise


@define(kw_only=True, on_setattr=checked)
class DistributedDataParallelConfig:
    """Data parallelism, with names as in megatron-core's ``DistributedDataParallelConfig``.

    Attributes:
        grad_reduce_in_fp32: Accumulate and reduce gradients in float32; null means as
            mixed_precision says, else off.
        overlap_grad_reduce: Reduce gradients while the backward pass runs; null means on where
            the distributed optimizer shares states among ranks with GPUs.
        overlap_param_gather: Gather parameters while the forward pass runs; null means as
            optimizer.overlap_param_gather, else on with an overlap_grad_reduce that is null.
        align_param_gather: Start the gathers of all pipeline stages together; null means on where
            gathers overlap and stages are interleaved.
        use_distributed_optimizer: Share optimizer states among data-parallel ranks; null means as
            optimizer.use_distributed_optimizer, else off.
        num_distributed_optimizer_instances: Copies of the distributed optimizer's states.
        check_for_nan_in_grad: Stop with an error when a gradient is not finite.
        check_for_large_grads: Stop with an error when a gradient is unusually large.
        bucket_size: Parameters of one communication bucket of what overlaps; null means the
            larger of 40 million and 1 million for each data-parallel rank.
        pad_buckets_for_high_nccl_busbw: Pad buckets to a multiple of 2^16.
        average_in_collective: Average in the collective instead of scaling before.
        fp8_param_gather: Gather parameters in FP8; null means as mixed_precision says, else off.
        reuse_grad_buf_for_mxfp8_param_ag: Gather MXFP8 parameters in the gradient buffer; null
            means as mixed_precision says, else off.
        use_megatron_fsdp: Shard parameters, gradients and optimizer states over data-parallel
            ranks with Megatron-FSDP.
        data_parallel_sharding_strategy: What Megatron-FSDP shards; null means optim_grads_params
            with use_megatron_fsdp, else no_shard.
        suggested_communication_unit_size: Parameters that Megatron-FSDP gathers or reduces at
            once; null means two transformer layers.
        fsdp_double_buffer: Keep Megatron-FSDP's two communication buffers allocated.
    """

    grad_reduce_in_fp32: bool | None = None
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None
    align_param_gather: bool | None = None
    use_distributed_optimizer: bool | None = None
    num_distributed_optimizer_instances: int = number(1, ge=1)
    check_for_nan_in_grad: bool = False
    check_for_large_grads: bool = False
    bucket_size: int | None = number(None, ge=1)
    pad_buckets_for_high_nccl_busbw: bool = False
    average_in_collective: bool = False
    fp8_param_gather: bool | None = None
    reuse_grad_buf_for_mxfp8_param_ag: bool | None = None
    use_megatron_fsdp: bool = False
    data_parallel_sharding_strategy: (
        Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] | None
    ) = None
    suggested_communication_unit_size: int | None = number(None, ge=1)
    fsdp_double_buffer: bool = False

    __attrs_post_init__ = check_all
    __repr__ = concise
