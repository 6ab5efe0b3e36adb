# SPDX-License-Identifier: Apache-2.0
"""What a metrics file says about a run, in one record."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from attrs import define, field
from mb_config.records import RunEnd, RunInfo, SaveEvent, StepEvent

from mb_logging import wording
from mb_logging.curves import Curves
from mb_logging.throughput import model_flops_utilization

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mb_config.records import Event


@define(kw_only=True)
class Summary:
    """A run, over all its parts.

    Attributes:
        run_name: Name for people, of the last part.
        parts: How often it was started.
        layouts: The parallel layout of each part.
        device: Kind of device, of the last part.
        num_parameters: Of the whole model.
        step: Steps done.
        tokens: Tokens consumed.
        first_loss: Training loss of the first step; None without steps.
        last_loss: Training loss of the last step; None without steps.
        best: ``name -> (loss, step)``, the least validation loss of each data set.
        tokens_per_second: Median over the reports; 0 where unknown.
        tflops_per_device: Median over the reports; 0 where unknown.
        mfu: Model FLOPs utilization of that, None where the device's peak is not known.
        skipped_steps: Steps without an update.
        checkpoints: Checkpoints saved.
        failed_checkpoints: Checkpoints that failed.
        seconds: Wall time of the parts that ended.
        end: How the last part ended; None if it goes on, or was killed.
    """

    run_name: str = ""
    parts: int = 0
    layouts: list[str] = field(factory=list)
    device: str = ""
    num_parameters: int = 0
    step: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    best: dict[str, tuple[float, int]] = field(factory=dict)
    tokens_per_second: float = 0.0
    tflops_per_device: float = 0.0
    mfu: float | None = None
    skipped_steps: int = 0
    checkpoints: int = 0
    failed_checkpoints: int = 0
    seconds: float = 0.0
    end: str | None = None


def summarize(events: Iterable[Event]) -> Summary:
    """Return the summary of a run's records, in order."""
    summary, curves, speeds = Summary(), Curves(), list[StepEvent]()
    for event in events:
        curves.add(event)
        if not isinstance(event, RunEnd):
            summary.end = None
        if isinstance(event, RunInfo):
            summary.run_name, summary.device = event.run_name, event.device
            summary.num_parameters = event.num_parameters
            summary.parts += 1
            summary.layouts.append(event.layout)
        elif isinstance(event, StepEvent):
            summary.tokens = event.consumed_tokens
            summary.skipped_steps += event.skipped_steps
            speeds.append(event)
        elif isinstance(event, SaveEvent):
            summary.checkpoints += event.status == "saved"
            summary.failed_checkpoints += event.status == "failed"
        elif isinstance(event, RunEnd):
            summary.seconds += event.seconds
            summary.end = event.reason
    _add_losses(summary, curves)
    _add_speed(summary, speeds)
    return summary


def _add_losses(summary: Summary, curves: Curves) -> None:
    if curves.train:
        losses = [point.loss for point in curves.train.values()]
        summary.step = max(curves.train)
        summary.first_loss, summary.last_loss = losses[0], losses[-1]
    for name, points in curves.validation.items():
        finite = {step: loss for step, loss in points.items() if math.isfinite(loss)}
        if finite:
            step = min(finite, key=finite.__getitem__)
            summary.best[name] = (finite[step], step)


def _add_speed(summary: Summary, steps: list[StepEvent]) -> None:
    rates = [s.tokens_per_second for s in steps if s.tokens_per_second]
    tflops = [s.tflops_per_device for s in steps if s.tflops_per_device]
    summary.tokens_per_second = statistics.median(rates) if rates else 0.0
    summary.tflops_per_device = statistics.median(tflops) if tflops else 0.0
    if tflops:
        summary.mfu = model_flops_utilization(summary.tflops_per_device, summary.device)


def as_lines(summary: Summary) -> list[str]:
    """Return the summary for people, a fact a line."""
    model = f"{wording.scaled(summary.num_parameters)} parameters, " if summary.parts else ""
    losses = (
        f"{summary.first_loss:.4f} at first, {summary.last_loss:.4f} at last"
        if summary.first_loss is not None and summary.last_loss is not None
        else "no step reported"
    )
    failed = f", {summary.failed_checkpoints} failed" if summary.failed_checkpoints else ""
    facts = {
        "run": f"{summary.run_name or '(unnamed)'}, {model}{summary.device}".rstrip(", "),
        "parts": f"{summary.parts}: {', then '.join(summary.layouts)}" if summary.parts else "",
        "steps": f"{summary.step:,} ({wording.scaled(summary.tokens)} tokens)",
        "skipped": str(summary.skipped_steps) if summary.skipped_steps else "",
        "training loss": losses,
        **{
            f"best {name}": f"{loss:.4f} (perplexity {math.exp(min(20.0, loss)):.2f}) at step {at}"
            for name, (loss, at) in summary.best.items()
        },
        "speed": _speed(summary),
        "checkpoints": f"{summary.checkpoints} saved{failed}",
        "time": wording.clock(summary.seconds) if summary.seconds else "",
        "end": summary.end or "not recorded: still running, or killed",
    }
    width = max(map(len, facts))
    return [f"{name:<{width}}  {fact}" for name, fact in facts.items() if fact]


def _speed(summary: Summary) -> str:
    words = wording.rates(
        summary.tokens_per_second, summary.tflops_per_device, device=summary.device
    )
    return ", ".join(word for word in words if word)
