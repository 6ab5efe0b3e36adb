# SPDX-License-Identifier: Apache-2.0
"""Optimizer and data parallelism: flags they share, and what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_config.resolve import overlap

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft


def resolve(draft: Draft) -> None:
    """Make shared flags agree and check them."""
    _share(draft, "use_distributed_optimizer")
    overlap.resolve_data_parallel(draft)
    _share(draft, "overlap_param_gather")
    overlap.check_data_parallel(draft)
    _distributed(draft)
    _muon(draft)
    _overrides(draft)
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


def _muon(draft: Draft) -> None:
    model, optimizer = draft.config.model, draft.config.optimizer
    if optimizer.optimizer != "muon":
        plain = type(optimizer)()
        for name in (
            "muon_momentum",
            "muon_nesterov",
            "muon_split_qkv",
            "muon_scale_mode",
            "muon_num_ns_steps",
            "muon_tp_mode",
            "muon_extra_scale_factor",
        ):
            draft.require(
                getattr(optimizer, name) == getattr(plain, name),
                f"optimizer.{name}",
                f"has no effect with optimizer={optimizer.optimizer}",
                "leave it out, or set optimizer.optimizer=muon",
            )
        return
    at = "optimizer.optimizer"
    draft.require(
        not model.fp16, at, "muon does not scale the loss, as fp16 needs", "use bf16_mixed"
    )
    draft.require(
        not draft.config.offload.optimizer_cpu_offload,
        "offload.optimizer_cpu_offload",
        "is for adam alone",
        "set it to false, or optimizer.optimizer=adam",
    )


_OVERRIDABLE = ("max_lr", "min_lr", "start_wd", "end_wd", "wd_mult", "lr_mult")


def _overrides(draft: Draft) -> None:
    for pattern, values in draft.config.optimizer.overrides.items():
        unknown = sorted(set(values) - set(_OVERRIDABLE))
        draft.require(
            not unknown,
            "optimizer.overrides",
            f"{pattern!r} sets {', '.join(unknown)}, which parameters cannot have of their own",
            f"use {', '.join(_OVERRIDABLE)}",
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
