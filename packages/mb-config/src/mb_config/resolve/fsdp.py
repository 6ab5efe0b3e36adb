# SPDX-License-Identifier: Apache-2.0
"""Megatron-FSDP: what it switches on, and what it does not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft

_AT = "ddp.use_megatron_fsdp"


def resolve(draft: Draft) -> None:
    """Derive the sharding strategy and the overlap it is made of; check what it excludes."""
    ddp = draft.config.ddp
    if not ddp.use_megatron_fsdp:
        draft.require(
            ddp.data_parallel_sharding_strategy in (None, "no_shard"),
            "ddp.data_parallel_sharding_strategy",
            "has no effect without use_megatron_fsdp",
            f"set {_AT}=true, or leave it out",
        )
        draft.fill("ddp.data_parallel_sharding_strategy", "no_shard", "no use_megatron_fsdp")
        for name in ("fsdp_double_buffer", "suggested_communication_unit_size"):
            draft.require(
                not getattr(ddp, name),
                f"ddp.{name}",
                "has no effect without use_megatron_fsdp",
                f"set {_AT}=true, or leave it out",
            )
        return
    _strategy(draft)
    _parallelism(draft)
    _others(draft)


def _strategy(draft: Draft) -> None:
    ddp, optimizer = draft.config.ddp, draft.config.optimizer
    draft.fill("ddp.data_parallel_sharding_strategy", "optim_grads_params", "use_megatron_fsdp")
    strategy = ddp.data_parallel_sharding_strategy
    draft.require(
        strategy != "no_shard",
        "ddp.data_parallel_sharding_strategy",
        "shards nothing, which is plain data parallelism",
        f"choose optim, optim_grads or optim_grads_params, or set {_AT}=false",
    )
    if optimizer.use_distributed_optimizer is None and ddp.use_distributed_optimizer is None:
        draft.derive("ddp.use_distributed_optimizer", True, "use_megatron_fsdp shards its states")
    draft.require(
        optimizer.use_distributed_optimizer is not False and ddp.use_distributed_optimizer,
        "ddp.use_distributed_optimizer",
        "use_megatron_fsdp needs it",
        "leave it out",
    )
    if strategy in ("optim_grads", "optim_grads_params") and not ddp.overlap_grad_reduce:
        draft.derive("ddp.overlap_grad_reduce", True, f"FSDP {strategy} reduces as it goes back")
    if strategy == "optim_grads_params":
        draft.fill("ddp.overlap_param_gather", True, f"FSDP {strategy} gathers layer by layer")
        draft.require(
            ddp.overlap_param_gather and optimizer.overlap_param_gather is not False,
            "ddp.overlap_param_gather",
            "FSDP optim_grads_params gathers parameters layer by layer",
            "leave it out",
        )
    draft.require(
        not ddp.fsdp_double_buffer or strategy == "optim_grads_params",
        "ddp.fsdp_double_buffer",
        "needs data_parallel_sharding_strategy=optim_grads_params",
        "leave it out",
    )


def _parallelism(draft: Draft) -> None:
    config = draft.config
    draft.require(
        config.model.pipeline_model_parallel_size == 1,
        _AT,
        "excludes pipeline parallelism: its device mesh knows no stages",
        "set model.pipeline_model_parallel_size=1",
    )
    replicas = (config.train.data_parallel_size or 0) * config.model.context_parallel_size
    draft.require(
        replicas != 1,
        _AT,
        "has nothing to shard over on one data-parallel rank, where megatron-core would count"
        " gradients twice",
        "set it to false, or start more ranks",
    )
    model = config.model
    per_expert = (model.expert_tensor_parallel_size or 1) * model.expert_model_parallel_size
    draft.require(
        model.num_moe_experts is None or replicas <= 1 or draft.world_size > per_expert,
        _AT,
        "needs two ranks or more for each shard of the experts, where megatron-core would count"
        f" gradients twice; here expert TP x EP = {per_expert} takes all {draft.world_size} ranks",
        "lower model.expert_model_parallel_size, or start more ranks",
    )
    draft.require(
        not config.dist.use_tp_pp_dp_mapping,
        "dist.use_tp_pp_dp_mapping",
        "excluded by ddp.use_megatron_fsdp, whose device mesh has the other order",
        "leave it out",
    )
    draft.require(
        config.ddp.num_distributed_optimizer_instances == 1,
        "ddp.num_distributed_optimizer_instances",
        "excluded by ddp.use_megatron_fsdp, which shards over all data-parallel ranks",
        "leave it out",
    )


def _others(draft: Draft) -> None:
    config, ddp = draft.config, draft.config.ddp
    because = "excluded by ddp.use_megatron_fsdp"
    excluded = (
        ("ddp.average_in_collective", ddp.average_in_collective, "which scales before it reduces"),
        (
            "ddp.reuse_grad_buf_for_mxfp8_param_ag",
            ddp.reuse_grad_buf_for_mxfp8_param_ag,
            "which has buffers of its own",
        ),
        ("ddp.check_for_large_grads", ddp.check_for_large_grads, "which does not look at them"),
        ("ddp.check_for_nan_in_grad", ddp.check_for_nan_in_grad, "which does not look at them"),
        ("ddp.align_param_gather", ddp.align_param_gather, "which has no stages to align"),
        (
            "rng.data_parallel_random_init",
            config.rng.data_parallel_random_init,
            "which takes each rank's shard as it is",
        ),
        (
            "train.check_weight_hash_across_dp_replicas_interval",
            config.train.check_weight_hash_across_dp_replicas_interval,
            "under which no two ranks hold the same weights",
        ),
        ("peft", config.peft is not None, "which would shard frozen weights with trained ones"),
    )
    for path, is_set, why in excluded:
        draft.require(not is_set, path, f"{because}, {why}", "leave it out")
    draft.require(
        str(config.env_vars.get("CUDA_DEVICE_MAX_CONNECTIONS", "")) != "1",
        "env_vars",
        "CUDA_DEVICE_MAX_CONNECTIONS=1 keeps Megatron-FSDP's gathers behind the computation",
        "set it to 8 or more, or leave it out",
    )
