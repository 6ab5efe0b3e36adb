# SPDX-License-Identifier: Apache-2.0
"""Optimizer and data parallelism: flags they share, and what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft


def resolve(draft: Draft) -> None:
    """Make shared flags agree and check them."""
    for name in ("use_distributed_optimizer", "overlap_param_gather"):
        _share(draft, name)
    _overlap(draft)
    _distributed(draft)
    _precision_aware(draft)
    _data_parallel(draft)


def _share(draft: Draft, name: str) -> None:
    optimizer, ddp = draft.config.optimizer, draft.config.ddp
    ours, theirs = getattr(optimizer, name), getattr(ddp, name)
    if ours is None and theirs is None:
        draft.derive(f"optimizer.{name}", False, "off unless set")
        draft.derive(f"ddp.{name}", False, "off unless set")
    elif ours is None:
        draft.derive(f"optimizer.{name}", theirs, f"ddp.{name}")
    elif theirs is None:
        draft.derive(f"ddp.{name}", ours, f"optimizer.{name}")
    else:
        draft.require(
            ours == theirs,
            f"ddp.{name}",
            f"must equal optimizer.{name}={ours}",
            "leave one of the two out",
        )


def _overlap(draft: Draft) -> None:
    ddp, optimizer = draft.config.ddp, draft.config.optimizer
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
    draft.require(
        not ddp.align_param_gather or ddp.overlap_param_gather,
        "ddp.align_param_gather",
        "needs overlap_param_gather",
        "set ddp.overlap_param_gather=true, or leave it out",
    )
    draft.require(
        not optimizer.overlap_param_gather_with_optimizer_step
        or (
            optimizer.overlap_param_gather
            and draft.config.model.virtual_pipeline_model_parallel_size is not None
        ),
        "optimizer.overlap_param_gather_with_optimizer_step",
        "needs overlap_param_gather and virtual pipeline stages",
        "set both, or leave it out",
    )


def _distributed(draft: Draft) -> None:
    optimizer, ddp = draft.config.optimizer, draft.config.ddp
    draft.require(
        optimizer.optimizer == "adam" or not optimizer.use_distributed_optimizer,
        "optimizer.optimizer",
        "the distributed optimizer is for adam alone",
        "set optimizer.use_distributed_optimizer=false, or use adam",
    )
    copies, dp = ddp.num_distributed_optimizer_instances, draft.config.train.data_parallel_size
    if copies == 1:
        return
    draft.require(
        ddp.use_distributed_optimizer,
        "ddp.num_distributed_optimizer_instances",
        "needs use_distributed_optimizer",
        "set ddp.use_distributed_optimizer=true",
    )
    draft.require(
        dp is None or dp % copies == 0,
        "ddp.num_distributed_optimizer_instances",
        f"must divide the data-parallel size {dp}",
        "choose a divisor",
    )


def _precision_aware(draft: Draft) -> None:
    optimizer = draft.config.optimizer
    if optimizer.use_precision_aware_optimizer:
        draft.require(
            optimizer.optimizer == "adam" and optimizer.use_distributed_optimizer,
            "optimizer.use_precision_aware_optimizer",
            "needs adam and the distributed optimizer",
            "set optimizer.use_distributed_optimizer=true",
        )
        draft.require(
            draft.config.dist.device != "cpu",
            "optimizer.use_precision_aware_optimizer",
            "needs CUDA and Transformer Engine",
            "leave it out",
        )
        return
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        draft.require(
            getattr(optimizer, name) == "float32",
            f"optimizer.{name}",
            "must be float32 without use_precision_aware_optimizer",
            "leave it out, or set optimizer.use_precision_aware_optimizer=true",
        )


def _data_parallel(draft: Draft) -> None:
    ddp, model = draft.config.ddp, draft.config.model
    draft.require(
        not (ddp.average_in_collective and model.calculate_per_token_loss),
        "ddp.average_in_collective",
        "excludes model.calculate_per_token_loss, which divides later",
        "set ddp.average_in_collective=false",
    )
