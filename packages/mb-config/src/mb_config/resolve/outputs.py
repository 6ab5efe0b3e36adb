# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, finetuning, profiling, processes and the environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_config.errors import Violation

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft


def resolve(draft: Draft) -> None:
    """Check what goes in and out of a run."""
    _saving(draft)
    _loading(draft)
    _processes(draft)
    _profiling(draft)
    _environment(draft)


def _saving(draft: Draft) -> None:
    checkpoint, at = draft.config.checkpoint, "checkpoint"
    for name in ("save_interval", "save_retain_interval", "save_hf"):
        draft.require(
            checkpoint.save is not None or getattr(checkpoint, name) is None,
            f"{at}.{name}",
            "has no effect without save",
            f"give {at}.save, a folder",
        )
    draft.require(
        checkpoint.most_recent_k != 0,
        f"{at}.most_recent_k",
        "would delete every checkpoint",
        "keep at least 1, or -1 for all",
    )
    draft.require(
        checkpoint.replicate_to is None or checkpoint.save not in (None, checkpoint.replicate_to),
        f"{at}.replicate_to",
        f"copies what is saved to another place, and save={checkpoint.save}",
        f"give {at}.save another folder, or leave it out",
    )
    draft.require(
        checkpoint.replica_most_recent_k == -1
        or (checkpoint.replica_most_recent_k > 0 and checkpoint.replicate_to is not None),
        f"{at}.replica_most_recent_k",
        "says how many copies to keep and needs at least 1, and replicate_to",
        f"give {at}.replicate_to, or -1",
    )
    interval, kept = checkpoint.save_interval, checkpoint.save_retain_interval
    draft.require(
        kept is None or (interval is not None and kept % interval == 0),
        f"{at}.save_retain_interval",
        f"must be a multiple of save_interval={interval}",
        "choose a multiple",
    )
    draft.require(
        kept is None or checkpoint.most_recent_k > 0,
        f"{at}.save_retain_interval",
        "has no effect while most_recent_k=-1 keeps every checkpoint",
        f"set {at}.most_recent_k, or leave it out",
    )


def _loading(draft: Draft) -> None:
    checkpoint, at = draft.config.checkpoint, "checkpoint"
    for name in ("ckpt_step", "exit_on_missing_checkpoint"):
        draft.require(
            checkpoint.load is not None or getattr(checkpoint, name) in (None, False),
            f"{at}.{name}",
            "has no effect without load",
            f"give {at}.load",
        )
    source = checkpoint.load or checkpoint.pretrained_checkpoint
    draft.require(
        source or not checkpoint.finetune,
        f"{at}.finetune",
        "needs weights to start from",
        f"give {at}.pretrained_checkpoint or {at}.load",
    )
    if draft.config.peft is not None:
        draft.require(
            source,
            f"{at}.pretrained_checkpoint",
            "peft needs a model to adapt",
            f"give {at}.pretrained_checkpoint, or unset peft",
        )
    scheduler = draft.config.scheduler
    draft.require(
        checkpoint.load or not scheduler.use_checkpoint_opt_param_scheduler,
        "scheduler.use_checkpoint_opt_param_scheduler",
        "needs a checkpoint to resume",
        f"give {at}.load",
    )


def _processes(draft: Draft) -> None:
    dist = draft.config.dist
    draft.require(
        not (dist.device == "cpu" and dist.distributed_backend == "nccl"),
        "dist.distributed_backend",
        "nccl needs CUDA, here dist.device=cpu",
        "leave it out, or use gloo",
    )
    if dist.device == "cpu":
        for name in ("nccl_communicator_config_path", "high_priority_stream_groups"):
            draft.require(
                not getattr(dist, name),
                f"dist.{name}",
                "is for NCCL, here dist.device=cpu",
                "leave it out",
            )
        for name in (
            "gradient_accumulation_fusion",
            "masked_softmax_fusion",
            "apply_rope_fusion",
            "persist_layer_norm",
        ):
            draft.require(
                not getattr(draft.config.model, name),
                f"model.{name}",
                "needs CUDA kernels, here dist.device=cpu",
                "set it to false",
            )
        draft.require(
            draft.config.model.layer_spec != "te",
            "model.layer_spec",
            "Transformer Engine needs CUDA, here dist.device=cpu",
            "use torch or auto",
        )


def _profiling(draft: Draft) -> None:
    profiling = draft.config.profiling
    draft.require(
        profiling.profile_step_end > profiling.profile_step_start,
        "profiling.profile_step_end",
        f"must be above profile_step_start={profiling.profile_step_start}",
        "raise it",
    )
    if not profiling.use_pytorch_profiler:
        return
    outside = [r for r in profiling.profile_ranks if r >= draft.world_size]
    draft.require(
        not outside,
        "profiling.profile_ranks",
        f"rank {outside[0] if outside else 0} does not exist among {draft.world_size}",
        "name existing ranks",
    )
    steps = draft.config.train.train_iters
    draft.require(
        steps is None or profiling.profile_step_start < steps,
        "profiling.profile_step_start",
        f"comes after the last step, {steps}",
        "start earlier, or train longer",
    )


def _environment(draft: Draft) -> None:
    for name, value in draft.config.env_vars.items():
        if not name or "=" in name or "\0" in f"{name}{value}":
            draft.violations.append(
                Violation(
                    field=f"env_vars.{name}",
                    value=repr(value),
                    rule="is no name of an environment variable",
                    remedy="correct the name",
                )
            )
