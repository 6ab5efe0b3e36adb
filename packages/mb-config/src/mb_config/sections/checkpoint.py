# SPDX-License-Identifier: Apache-2.0
"""Saving and loading checkpoints."""

from __future__ import annotations

from typing import Literal

from attrs import define

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class CheckpointConfig:
    """Where and when to save, and what to start from.

    Nothing is resumed unless load says so.

    Attributes:
        save: Folder or URL to save into; null saves nothing.
        save_interval: Steps between saves; null saves at the end only.
        load: Folder or URL to go on from; null starts anew.
        ckpt_step: Step to load; null means the newest complete one.
        async_save: Write in the background while training goes on.
        async_queue: When a save is due while one is still being written: wait for it, or refuse
            (skip) the new one and report that.
        staging: Copy the state to host memory before training goes on (eager), or behind the next
            forward and backward pass, waiting only before the optimizer step (lazy).
        writer: Write on a thread of the training process, or in a process of its own.
        layout: All tensors of a rank in one array (packed), or a zarr array a tensor that other
            tools can read (zarr), which is slower with many tensors.
        compression: Compress with zstd, or not (none).
        compression_level: Of zstd, from 1 (fast) to 22 (small).
        replicate_to: Second folder or URL, to which every checkpoint is copied in the background;
            the newest of both is loaded.
        replica_most_recent_k: Newest checkpoints to keep there; -1 keeps all.
        save_optim: Save the optimizer.
        save_rng: Save random states.
        load_optim: Load the optimizer.
        load_rng: Load random states.
        finetune: Load only the weights and start at step 0.
        pretrained_checkpoint: Weights to start from where load has none: a checkpoint, or a folder
            in the Hugging Face format.
        save_hf: Folder in which every save also writes the weights in the Hugging Face format.
        exit_on_missing_checkpoint: Fail when load holds no checkpoint, instead of starting anew.
        most_recent_k: Newest checkpoints to keep; -1 keeps all.
        save_retain_interval: Steps whose multiples are kept for ever; a multiple of save_interval.
        backend: Name of the checkpoint writer in the entry-point group mb.checkpointers.
    """

    save: str | None = None
    save_interval: int | None = number(None, ge=1)
    load: str | None = None
    ckpt_step: int | None = number(None, ge=0)
    async_save: bool = True
    async_queue: Literal["wait", "refuse"] = "wait"
    staging: Literal["eager", "lazy"] = "lazy"
    writer: Literal["thread", "process"] = "thread"
    layout: Literal["packed", "zarr"] = "packed"
    compression: Literal["none", "zstd"] = "none"
    compression_level: int = number(3, ge=1, le=22)
    replicate_to: str | None = None
    replica_most_recent_k: int = number(-1, ge=-1)
    save_optim: bool = True
    save_rng: bool = True
    load_optim: bool = True
    load_rng: bool = True
    finetune: bool = False
    pretrained_checkpoint: str | None = None
    save_hf: str | None = None
    exit_on_missing_checkpoint: bool = False
    most_recent_k: int = number(-1, ge=-1)
    save_retain_interval: int | None = number(None, ge=1)
    backend: str = "tensorstore"

    __attrs_post_init__ = check_all
    __repr__ = concise
