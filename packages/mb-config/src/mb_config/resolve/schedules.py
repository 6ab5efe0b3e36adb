# SPDX-License-Identifier: Apache-2.0
"""Learning-rate and weight-decay schedules, turned into samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_config.resolve.batches import total_samples

if TYPE_CHECKING:
    from mb_config.ramp import Ramp
    from mb_config.resolve.draft import Draft


def resolve(draft: Draft, ramp: Ramp | None) -> None:
    """Derive lengths in samples and check the shapes."""
    _rates(draft)
    _weight_decay(draft)
    _either(draft, "lr_decay")
    _either(draft, "lr_warmup")
    _either(draft, "lr_wsd_decay")
    _styles(draft)
    scheduler = draft.config.scheduler
    draft.require(
        not (
            scheduler.override_opt_param_scheduler and scheduler.use_checkpoint_opt_param_scheduler
        ),
        "scheduler.override_opt_param_scheduler",
        "excludes use_checkpoint_opt_param_scheduler",
        "set one of them to false",
    )
    if ramp is not None:
        _lengths(draft, ramp)


def _rates(draft: Draft) -> None:
    optimizer, scheduler = draft.config.optimizer, draft.config.scheduler
    draft.require(
        optimizer.min_lr <= optimizer.lr,
        "optimizer.min_lr",
        f"must be at most optimizer.lr={optimizer.lr}",
        "lower it, or raise optimizer.lr",
    )
    draft.require(
        scheduler.lr_warmup_init <= optimizer.lr,
        "scheduler.lr_warmup_init",
        f"must be at most optimizer.lr={optimizer.lr}",
        "lower it, or raise optimizer.lr",
    )


def _weight_decay(draft: Draft) -> None:
    scheduler, constant = draft.config.scheduler, draft.config.optimizer.weight_decay
    for name in ("start_weight_decay", "end_weight_decay"):
        draft.fill(f"scheduler.{name}", constant, "optimizer.weight_decay")
    start, end = scheduler.start_weight_decay, scheduler.end_weight_decay
    assert start is not None
    assert end is not None
    if scheduler.weight_decay_incr_style == "constant":
        for name, value in (("start_weight_decay", start), ("end_weight_decay", end)):
            draft.require(
                value == constant,
                f"scheduler.{name}",
                f"must equal optimizer.weight_decay={constant} with"
                " weight_decay_incr_style=constant",
                "leave it out, or set scheduler.weight_decay_incr_style=linear",
            )
        return
    draft.require(
        start <= end,
        "scheduler.start_weight_decay",
        f"must be at most end_weight_decay={end}: weight decay only grows",
        "swap the two",
    )


def _either(draft: Draft, length: str) -> None:
    """Check that one length is not given twice, in iterations and in samples."""
    scheduler = draft.config.scheduler
    names = [f"{length}_iters", f"{length}_samples"]
    if length == "lr_warmup":
        names.insert(0, "lr_warmup_fraction")
    given = [n for n in names if getattr(scheduler, n)]
    if len(given) > 1:
        draft.deny(
            f"scheduler.{given[1]}", f"excludes scheduler.{given[0]}", "leave one of them out"
        )


def _styles(draft: Draft) -> None:
    scheduler = draft.config.scheduler
    style = scheduler.lr_decay_style
    tails = ("lr_wsd_decay_iters", "lr_wsd_decay_samples")
    if style == "WSD":
        draft.require(
            any(getattr(scheduler, n) for n in tails),
            "scheduler.lr_wsd_decay_iters",
            "WSD needs the length of its last phase",
            "give scheduler.lr_wsd_decay_iters",
        )
        return
    for name in tails:
        draft.require(
            getattr(scheduler, name) is None,
            f"scheduler.{name}",
            f"has no effect with lr_decay_style={style}",
            "leave it out, or set scheduler.lr_decay_style=WSD",
        )


def _lengths(draft: Draft, ramp: Ramp) -> None:
    scheduler = draft.config.scheduler
    total = total_samples(draft, ramp)
    decay, why = _length(draft, ramp, "lr_decay")
    if decay is None:
        decay, why = total, _whole_run(draft)
    if decay is None:
        return  # the number of epochs becomes steps once the data is known
    draft.fix("scheduler.lr_decay_steps", decay, why)
    if scheduler.lr_warmup_fraction:
        warmup = int(scheduler.lr_warmup_fraction * decay)
        how = f"lr_warmup_fraction {scheduler.lr_warmup_fraction} x lr_decay_steps {decay}"
    else:
        found, how = _length(draft, ramp, "lr_warmup")
        warmup = found or 0
    draft.fix("scheduler.lr_warmup_steps", warmup, how or "no warm-up")
    _warmup_fits(draft, decay, warmup)
    if total is not None:
        draft.fix("scheduler.wd_incr_steps", total, _whole_run(draft))
    if scheduler.lr_decay_style != "WSD":
        return
    tail, how = _length(draft, ramp, "lr_wsd_decay", end=decay)
    if tail is None:
        return
    draft.fix("scheduler.wsd_decay_steps", tail, how)
    unit = "iters" if scheduler.lr_wsd_decay_iters else "samples"
    draft.require(
        warmup + tail <= decay,
        f"scheduler.lr_wsd_decay_{unit}",
        f"its {tail} samples and {warmup} of warm-up must fit into {decay} of decay",
        "shorten it, or train longer",
    )


def _warmup_fits(draft: Draft, decay: int, warmup: int) -> None:
    scheduler = draft.config.scheduler
    unit = "samples" if scheduler.lr_warmup_samples else "iters"
    draft.require(
        warmup < decay,
        f"scheduler.lr_warmup_{unit}",
        f"its {warmup} samples must be fewer than the {decay} of the decay",
        "warm up for less time, or decay for longer",
    )


def _length(draft: Draft, ramp: Ramp, name: str, end: int | None = None) -> tuple[int | None, str]:
    """Return a length in samples and how it came about; None if it is not given.

    Args:
        draft: The configuration.
        ramp: Batch sizes of the run.
        name: Field name without the unit.
        end: Where the stretch ends, in samples; None means it begins with the run.
    """
    scheduler = draft.config.scheduler
    samples = getattr(scheduler, f"{name}_samples")
    if samples:
        return samples, f"{name}_samples"
    steps = getattr(scheduler, f"{name}_iters")
    if not steps:
        return None, ""
    if end is None:
        found = ramp.samples_after(steps)
    else:
        # the last steps before *end*, which a ramp-up may have made smaller
        before = max(0, ramp.steps_within(end) - steps)
        found = end - ramp.samples_after(before)
    sizes = "ramping up to" if ramp.samples else "of"
    return found, f"{name}_iters {steps} in steps {sizes} {ramp.target} samples"


def _whole_run(draft: Draft) -> str:
    train = draft.config.train
    if train.train_samples is not None:
        return "train_samples"
    if train.train_tokens is not None:
        return f"train_tokens {train.train_tokens} / seq_length {draft.config.model.seq_length}"
    ramped = ", ramp-up included" if train.rampup_batch_size else ""
    return f"train_iters {train.train_iters} x global_batch_size {train.global_batch_size}{ramped}"
