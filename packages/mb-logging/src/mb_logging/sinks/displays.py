# SPDX-License-Identifier: Apache-2.0
"""Ways to show progress on a text stream: lines for files, a bar for terminals."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Protocol, TextIO

from mb_logging import wording

if TYPE_CHECKING:
    from collections.abc import Callable

    from mb_config.records import StepEvent

    from mb_logging.progress import Progress

_BAR = 20


class Display(Protocol):
    """Shows steps in passing and other things for good."""

    def step(self, event: StepEvent, *, device: str) -> None:
        """Show the state of the run."""
        ...

    def line(self, text: str, *, style: str = "") -> None:
        """Print a line that stays; *style* is a colour where there are any."""
        ...

    def close(self) -> None:
        """Leave the stream at the start of a line."""
        ...


class PlainLines:
    """One aligned line a step, *interval_s* apart; the last one is always printed.

    Args:
        stream: Where to.
        progress: Of the run.
        interval_s: Seconds between two step lines at least.
        clock: Seconds of any clock that does not go back.
    """

    def __init__(
        self,
        stream: TextIO,
        progress: Progress,
        *,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._progress = progress
        self._interval_s = interval_s
        self._clock = clock
        self._printed = float("-inf")
        self._held: str | None = None

    def step(self, event: StepEvent, *, device: str) -> None:
        """Print the step, or hold it back until the next one is due."""
        self._held = aligned(event, self._progress, device=device)
        if self._progress.is_complete or self._clock() - self._printed >= self._interval_s:
            self._release()

    def line(self, text: str, *, style: str = "") -> None:
        """Print a line, after the step that it follows."""
        del style
        self._release()
        put(self._stream, text + "\n")

    def close(self) -> None:
        """Print what was held back."""
        self._release()
        self._stream.flush()

    def _release(self) -> None:
        if self._held is not None:
            put(self._stream, self._held + "\n")
            self._held, self._printed = None, self._clock()


class TextBar:
    """A bar that is drawn over itself, for terminals where rich is not installed."""

    def __init__(self, stream: TextIO, progress: Progress) -> None:
        self._stream = stream
        self._progress = progress
        self._width = 0

    def step(self, event: StepEvent, *, device: str) -> None:
        """Draw the bar anew."""
        progress = self._progress
        full = round(progress.fraction * _BAR)
        left = progress.seconds_left
        parts = [
            f"[{'#' * full}{'.' * (_BAR - full)}] {progress.done}/{progress.total}"
            if progress.total is not None
            else f"step {progress.done}",
            f"ETA {wording.clock(left)}" if left is not None else "",
            *wording.losses(event),
            *wording.rates(event.tokens_per_second, event.tflops_per_device, device=device),
            *wording.extras(event),
        ]
        # A line that wraps could not be drawn over.
        text = "  ".join(p for p in parts if p)[: shutil.get_terminal_size().columns - 1]
        put(self._stream, f"\r{text:<{self._width}}")
        self._width = len(text)

    def line(self, text: str, *, style: str = "") -> None:
        """Print a line where the bar was; the next step draws it again below."""
        del style
        put(self._stream, f"\r{' ' * self._width}\r{text}\n" if self._width else text + "\n")
        self._width = 0

    def close(self) -> None:
        """Leave the bar and end its line."""
        if self._width:
            put(self._stream, "\n")
            self._width = 0


def aligned(event: StepEvent, progress: Progress, *, device: str) -> str:
    """Return a step as one line whose columns stand under those of the line before."""
    total = "" if progress.total is None else f"/{progress.total}"
    grad_norm = "" if event.grad_norm is None else f"grad norm {event.grad_norm:>8.3f}"
    speed, tflops, mfu = wording.rates(
        event.tokens_per_second, event.tflops_per_device, device=device
    )
    left = progress.seconds_left
    cells = [
        f"step {event.step:>{max(6, len(total) - 1)}}{total}",
        f"loss {event.loss:>8.4f}",
        f"lr {event.learning_rate:.2e}",
        grad_norm,
        f"{speed:>18}" if speed else "",
        f"{tflops:>13}" if tflops else "",
        mfu,
        f"ETA {wording.clock(left):>7}" if left is not None else "",
        *wording.extras(event),
    ]
    return "  ".join(cell for cell in cells if cell)


def put(stream: TextIO, text: str) -> None:
    """Write *text* and flush; what the stream's encoding lacks becomes a question mark."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()
