# SPDX-License-Identifier: Apache-2.0
"""Records in words and numbers as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_logging.throughput import model_flops_utilization

if TYPE_CHECKING:
    from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent


def run_line(event: RunInfo) -> str:
    """Return what is known when a run starts."""
    ranks = f"{event.world_size} x " if event.world_size > 1 else ""
    parts = [
        f"{scaled(event.num_parameters)} parameters" if event.num_parameters else "",
        f"{ranks}{event.device}",
        event.layout,
        f"sequence {event.sequence_length}" if event.sequence_length else "",
        f"from step {event.start_step}" if event.start_step else "",
        f"to step {event.total_steps}" if event.total_steps is not None else "",
    ]
    return f"{event.run_name}: {', '.join(p for p in parts if p)}"


def eval_line(event: EvalEvent) -> str:
    """Return the result of an evaluation."""
    more = "".join(f"  {name} {value:.4g}" for name, value in event.metrics.items())
    return (
        f"{event.name}: loss {event.loss:.4f}  perplexity {event.perplexity:.2f}{more}"
        f"  ({event.seconds:.1f} s)"
    )


def save_line(event: SaveEvent) -> str | None:
    """Return what became of a checkpoint, None where it has only begun."""
    if event.status == "saved":
        return f"checkpoint in {event.path} ({event.seconds:.1f} s)"
    if event.status == "failed":
        return f"CHECKPOINT FAILED: {event.error}"
    return None


def end_line(event: RunEnd) -> str:
    """Return how a run ended."""
    code = f", exit code {event.exit_code}" if event.exit_code else ""
    return f"ended after step {event.step}: {event.reason} ({clock(event.seconds)}{code})"


def losses(event: StepEvent) -> list[str]:
    """Return what a step says about learning."""
    return [
        f"loss {event.loss:.4f}",
        f"lr {event.learning_rate:.2e}",
        f"grad norm {event.grad_norm:.3f}" if event.grad_norm is not None else "",
    ]


def rates(tokens_per_second: float, tflops_per_device: float, *, device: str = "") -> list[str]:
    """Return three words about speed; empty ones for what is 0 or not known."""
    mfu = model_flops_utilization(tflops_per_device, device)
    return [
        f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second else "",
        f"{_tflops(tflops_per_device)} TFLOP/s" if tflops_per_device else "",
        f"MFU {mfu:.1%}" if mfu else "",
    ]


def extras(event: StepEvent) -> list[str]:
    """Return what only some runs report."""
    return [
        f"loss scale {event.loss_scale:.0f}" if event.loss_scale is not None else "",
        f"skipped {event.skipped_steps}" if event.skipped_steps else "",
        *(f"{name} {value:.4g}" for name, value in event.metrics.items()),
    ]


def scaled(number: float) -> str:
    """Return *number* with three or four digits and a unit, such as ``"1.23 M"``."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Return a time as ``m:ss``, ``h:mm:ss`` or days and hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _tflops(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
