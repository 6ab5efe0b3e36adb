# SPDX-License-Identifier: Apache-2.0
"""What a person sees: a progress bar on a terminal, one line a report elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent

if TYPE_CHECKING:
    from mb_config.records import Event

_BAR = 24


class Console:
    """Prints every record; on a terminal, steps become a bar that is drawn over itself.

    Args:
        total: Steps of the whole run, for the bar and the time left; taken from ``RunInfo`` if None.
        stream: Where to; standard output if None.
        interval_s: Between two step lines where there is no terminal, at least so many seconds.
    """

    def __init__(
        self, total: int | None = None, *, stream: TextIO | None = None, interval_s: float = 0.0
    ) -> None:
        self._total = total
        self._start = 0
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._interval_s = interval_s
        self._printed = float("-inf")
        self._began = time.monotonic()
        self._bar_width = 0

    def write(self, event: Event) -> None:
        """Print *event*."""
        if isinstance(event, StepEvent):
            self._step(event)
        elif isinstance(event, RunInfo):
            self._total = event.total_steps if self._total is None else self._total
            self._start, self._began = event.start_step, time.monotonic()
            self._line(_run_line(event))
        elif isinstance(event, EvalEvent):
            self._line(
                f"step {event.step:>6}  {event.name}: loss {event.loss:.4f}"
                f"  perplexity {event.perplexity:.2f}  ({event.seconds:.1f} s)"
            )
        elif isinstance(event, SaveEvent):
            self._save(event)
        elif isinstance(event, RunEnd):
            self._line(f"ended after step {event.step}: {event.reason} ({event.seconds:.0f} s)")

    def close(self) -> None:
        """End the bar's line."""
        if self._bar_width:
            self._stream.write("\n")
            self._bar_width = 0
        self._stream.flush()

    def _step(self, event: StepEvent) -> None:
        text = self._step_text(event)
        if self._live:
            padding = " " * max(0, self._bar_width - len(text))
            self._stream.write(f"\r{text}{padding}")
            self._stream.flush()
            self._bar_width = len(text)
            return
        now = time.monotonic()
        last = self._total is not None and event.step >= self._total
        if last or now - self._printed >= self._interval_s:
            self._printed = now
            self._line(text)

    def _step_text(self, event: StepEvent) -> str:
        parts = [
            f"loss {event.loss:.4f}",
            f"lr {event.learning_rate:.2e}",
            f"grad norm {event.grad_norm:.3f}" if event.grad_norm is not None else "",
            f"{event.tokens_per_second:,.0f} tokens/s" if event.tokens_per_second else "",
            f"{_tflops(event.tflops_per_device)} TFLOP/s" if event.tflops_per_device else "",
            f"loss scale {event.loss_scale:.0f}" if event.loss_scale is not None else "",
            f"skipped {event.skipped_steps}" if event.skipped_steps else "",
            *(f"{name} {value:.4g}" for name, value in event.metrics.items()),
            self._time_left(event.step),
        ]
        body = "  ".join(p for p in parts if p)
        if self._total is None:
            return f"step {event.step:>6}  {body}"
        done = min(1.0, event.step / self._total)
        if not self._live:
            return f"step {event.step:>6}/{self._total}  {body}"
        full = round(done * _BAR)
        bar = "━" * full + "─" * (_BAR - full)
        return f"{bar} {event.step}/{self._total}  {body}"

    def _time_left(self, step: int) -> str:
        done = step - self._start
        if self._total is None or done <= 0:
            return ""
        left = (time.monotonic() - self._began) / done * max(0, self._total - step)
        return f"ETA {_clock(left)}"

    def _save(self, event: SaveEvent) -> None:
        if event.status == "saved":
            self._line(f"step {event.step:>6}  checkpoint in {event.path} ({event.seconds:.1f} s)")
        elif event.status == "failed":
            self._line(f"step {event.step:>6}  CHECKPOINT FAILED: {event.error}")

    def _line(self, text: str) -> None:
        if self._bar_width:
            self._stream.write("\r" + " " * self._bar_width + "\r")
            self._bar_width = 0
        self._stream.write(text + "\n")
        self._stream.flush()


def _run_line(event: RunInfo) -> str:
    size = _scaled(event.num_parameters)
    resumed = f", from step {event.start_step}" if event.start_step else ""
    return f"{event.run_name}: {size} parameters on {event.device}, {event.layout}{resumed}"


def _scaled(number: float) -> str:
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f}"


def _tflops(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _clock(seconds: Any) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
