# SPDX-License-Identifier: Apache-2.0
"""Batch sizes, ramp-up and the number of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_config.ramp import Ramp

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft

_DURATIONS = ("train_iters", "train_samples", "train_tokens", "num_epochs")


def resolve(draft: Draft) -> Ramp | None:
    """Derive batches and steps; return the batch sizes of the run, None after a violation."""
    ramp = _batches(draft)
    _duration(draft, ramp)
    _evaluation(draft)
    _garbage(draft)
    return ramp


def _batches(draft: Draft) -> Ramp | None:
    train = draft.config.train
    size, dp = train.micro_batch_size, train.data_parallel_size
    if dp is None:
        return None
    multiple = size * dp
    words = f"micro_batch_size {size} x data_parallel_size {dp}"
    draft.fill("train.global_batch_size", multiple, words)
    target = train.global_batch_size
    assert target is not None
    rounded = multiple if train.decrease_batch_size_if_needed else 1
    ramp = _ramp(draft, target, rounded)
    if ramp is None:
        return None
    for batch in ramp.sizes():
        if batch < multiple or (rounded == 1 and batch % multiple):
            name = "global_batch_size" if batch == target else "rampup_batch_size"
            reached = "" if batch == target else f"reaches {batch}, which "
            draft.deny(
                f"train.{name}",
                f"{reached}must be a multiple of {words} = {multiple}",
                _batch_remedy(batch, multiple),
            )
            return None
    kept = target - target % multiple
    note = f"global_batch_size {target}" if kept == target else f"{kept} of {target} samples"
    draft.fix("train.num_microbatches", kept // multiple, f"{note} / ({words})")
    return _interleaving(draft, ramp, multiple)


def _batch_remedy(batch: int, multiple: int) -> str:
    if batch < multiple:
        return f"use {multiple}, a smaller micro_batch_size, or fewer ranks"
    low = batch - batch % multiple
    return f"use {low} or {low + multiple}, or set train.decrease_batch_size_if_needed=true"


def _ramp(draft: Draft, target: int, multiple: int) -> Ramp | None:
    given = draft.config.train.rampup_batch_size
    if given is None:
        return Ramp(target=target, multiple=multiple)
    name = "train.rampup_batch_size"
    if not draft.require(
        len(given) == 3,
        name,
        "must be [start, increment, samples]",
        "give three numbers, such as [16, 16, 100000]",
    ):
        return None
    start, increment, samples = given
    if not draft.require(
        start <= target,
        name,
        f"must start at or below global_batch_size={target}",
        "lower the first number",
    ):
        return None
    if start == target:
        return Ramp(target=target, multiple=multiple)
    if not draft.require(
        (target - start) % increment == 0,
        name,
        f"increments of {increment} from {start} never reach global_batch_size={target}",
        f"choose an increment that divides {target - start}",
    ):
        return None
    return Ramp(target=target, start=start, increment=increment, samples=samples, multiple=multiple)


def _interleaving(draft: Draft, ramp: Ramp, multiple: int) -> Ramp:
    """Check that the interleaved pipeline gets whole groups of micro-batches at every size."""
    model = draft.config.model
    pp = model.pipeline_model_parallel_size
    if pp == 1 or model.virtual_pipeline_model_parallel_size is None:
        return ramp
    if "microbatch_group_size_per_vp_stage" in model.megatron:
        return ramp
    for batch in ramp.sizes():
        if not draft.require(
            (batch // multiple) % pp == 0,
            "train.global_batch_size",
            f"its {batch // multiple} micro-batches must be a multiple of the {pp} pipeline stages"
            " with virtual stages" + ("" if batch == ramp.target else f" (ramp-up at {batch})"),
            f"use a multiple of {multiple * pp}",
        ):
            break
    return ramp


def _duration(draft: Draft, ramp: Ramp | None) -> None:
    train = draft.config.train
    given = [name for name in _DURATIONS if getattr(train, name) is not None]
    if not given:
        draft.deny(
            "train.train_iters",
            f"exactly one of {', '.join(_DURATIONS)} must be set",
            "give train.train_iters",
        )
        return
    if len(given) > 1:
        draft.deny(
            f"train.{given[1]}",
            f"excludes train.{given[0]}: exactly one duration must be set",
            f"leave one of {', '.join(given)} out",
        )
        return
    if ramp is None or given[0] in ("train_iters", "num_epochs"):
        return
    samples = total_samples(draft, ramp)
    steps = ramp.steps_within(samples or 0)
    if draft.require(
        steps > 0,
        f"train.{given[0]}",
        f"is less than one step of {ramp.batch_at(0)} samples",
        "raise it, or lower train.global_batch_size",
    ):
        tokens = f"train_tokens {train.train_tokens} / seq_length {draft.config.model.seq_length} ="
        what = f"{tokens} {samples} samples" if train.train_tokens else f"train_samples {samples}"
        how = "ramping up to" if ramp.samples else "of"
        draft.derive(
            "train.train_iters",
            steps,
            f"{what} in steps {how} {ramp.batch_at(samples)}" if samples else what,
        )


def total_samples(draft: Draft, ramp: Ramp) -> int | None:
    """Return the samples of the whole run; None while only the number of epochs is known."""
    train, seq_length = draft.config.train, draft.config.model.seq_length
    if train.train_samples is not None:
        return train.train_samples
    if train.train_tokens is not None:
        return train.train_tokens // max(1, seq_length)
    if train.train_iters is not None:
        return ramp.samples_after(train.train_iters)
    return None


def _evaluation(draft: Draft) -> None:
    train, validation = draft.config.train, draft.config.validation
    draft.fill("validation.eval_micro_batch_size", train.micro_batch_size, "train.micro_batch_size")
    dp, size = train.data_parallel_size, validation.eval_micro_batch_size
    if dp is None or size is None:
        return
    multiple = size * dp
    words = f"eval_micro_batch_size {size} x data_parallel_size {dp}"
    if validation.eval_global_batch_size is None:
        target = train.global_batch_size or multiple
        whole = max(multiple, target - target % multiple)
        note = "" if whole == target else f", by multiples of {words}"
        draft.derive(
            "validation.eval_global_batch_size", whole, f"train.global_batch_size {target}{note}"
        )
    batch = validation.eval_global_batch_size
    assert batch is not None
    fits = draft.require(
        batch % multiple == 0,
        "validation.eval_global_batch_size",
        f"must be a multiple of {words} = {multiple}",
        _eval_remedy(batch, multiple),
    )
    pp, vpp = (
        draft.config.model.pipeline_model_parallel_size,
        draft.config.model.virtual_pipeline_model_parallel_size,
    )
    if fits and pp > 1 and vpp is not None:
        draft.require(
            batch // multiple % pp == 0,
            "validation.eval_global_batch_size",
            f"its {batch // multiple} micro-batches must be a multiple of the {pp} pipeline stages"
            " with virtual stages",
            f"use a multiple of {multiple * pp}",
        )


def _eval_remedy(batch: int, multiple: int) -> str:
    low = batch - batch % multiple
    return f"use {low + multiple}" if low == 0 else f"use {low} or {low + multiple}"


def _garbage(draft: Draft) -> None:
    train = draft.config.train
    draft.require(
        train.manual_gc or train.manual_gc_interval == 0,
        "train.manual_gc_interval",
        "has no effect without manual_gc",
        "set train.manual_gc=true",
    )
