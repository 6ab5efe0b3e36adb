# SPDX-License-Identifier: Apache-2.0
"""How long and with which batches to train, and when to stop."""

from __future__ import annotations

from typing import Literal

from attrs import define, field

from mb_config._fields import derived, number, within
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class TrainingConfig:
    """Batches, duration and exits of a run.

    Exactly one of train_iters, train_samples, train_tokens and num_epochs says how long.

    Attributes:
        micro_batch_size: Samples one rank runs through the model at a time.
        global_batch_size: Samples of one optimizer step over all ranks; null means
            micro_batch_size x data_parallel_size.
        rampup_batch_size: Batch-size ramp-up [start, increment, samples]: begin with start, add
            increment at even spaces, reach global_batch_size after samples.
        decrease_batch_size_if_needed: Round batches down to a multiple of
            micro_batch_size x data_parallel_size instead of refusing them.
        train_iters: Optimizer steps; derived if another duration is given.
        train_samples: Samples.
        train_tokens: Tokens, that is samples x seq_length.
        num_epochs: Passes over the training data; train_iters is known once the data is.
        exit_interval: Save and exit at the next step that is a multiple of this.
        exit_duration_in_mins: Save and exit after so many minutes.
        exit_signal_handler: Save and exit on exit_signal.
        exit_signal: Signal that exit_signal_handler waits for.
        manual_gc: Switch automatic garbage collection off and collect on all ranks together.
        manual_gc_interval: Steps between collections; 0 collects at the start only.
        manual_gc_eval: Collect before and after evaluation, too.
        iterations_to_skip: Steps (from 1) whose data is consumed without an update.
        check_for_nan_in_loss: Stop with an error when the loss is not finite.
        empty_unused_memory_level: 1 empties the CUDA cache before, 2 also after each update.
        check_weight_hash_across_dp_replicas_interval: Steps between comparisons of the weights of
            data-parallel replicas; null never.
        train_sync_interval: Steps between device synchronizations; null never.
        data_parallel_size: Derived: world size / (TP x PP x CP).
        num_microbatches: Derived: micro-batches of one step on one rank, at full batch size.
    """

    micro_batch_size: int = number(1, ge=1)
    global_batch_size: int | None = number(None, ge=1)
    rampup_batch_size: list[int] | None = field(default=None, metadata=within(ge=1))
    decrease_batch_size_if_needed: bool = False
    train_iters: int | None = number(None, ge=1)
    train_samples: int | None = number(None, ge=1)
    train_tokens: int | None = number(None, ge=1)
    num_epochs: float | None = number(None, gt=0)
    exit_interval: int | None = number(None, ge=1)
    exit_duration_in_mins: float | None = number(None, gt=0)
    exit_signal_handler: bool = True
    exit_signal: Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"] = "SIGTERM"
    manual_gc: bool = False
    manual_gc_interval: int = number(0, ge=0)
    manual_gc_eval: bool = True
    iterations_to_skip: list[int] = field(factory=list, metadata=within(ge=1))
    check_for_nan_in_loss: bool = True
    empty_unused_memory_level: Literal[0, 1, 2] = 0
    check_weight_hash_across_dp_replicas_interval: int | None = number(None, ge=1)
    train_sync_interval: int | None = number(None, ge=1)
    data_parallel_size: int | None = derived()
    num_microbatches: int | None = derived()

    __attrs_post_init__ = check_all
    __repr__ = concise
