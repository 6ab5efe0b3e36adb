# SPDX-License-Identifier: Apache-2.0
"""A live bar of two lines, drawn by rich; what the program prints goes above it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from mb_logging import wording
from mb_logging.errors import require

if TYPE_CHECKING:
    from mb_config.records import StepEvent

    from mb_logging.progress import Progress

_BAR = 28
_REDRAW_S = 0.1


class RichBar:
    """Shows progress and speed in one line, and below it what the run learns.

    It is drawn when a step is reported, ten times a second at most, and starts no thread.
    """

    def __init__(self, stream: TextIO, progress: Progress) -> None:
        self._progress = progress
        self._text = _rich("text").Text
        self._table = _rich("table").Table
        self._bar = _rich("progress_bar").ProgressBar
        self._group = _rich("console").Group
        self._console = _rich("console").Console(file=stream)
        self._live = _rich("live").Live(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=stream is sys.stdout,
            redirect_stderr=stream is sys.stdout and sys.stderr.isatty(),
        )
        self._drawn = float("-inf")

    def step(self, event: StepEvent, *, device: str) -> None:
        """Draw the bar anew."""
        if not self._live.is_started:
            self._live.start()
        now = time.monotonic()
        due = now - self._drawn >= _REDRAW_S or self._progress.is_complete
        self._drawn = now if due else self._drawn
        self._live.update(self._picture(event, device), refresh=due)

    def line(self, text: str, *, style: str = "") -> None:
        """Print a line above the bar."""
        self._console.print(self._text(text, style=style), soft_wrap=True)

    def close(self) -> None:
        """Draw the last state, leave it there and give standard output back."""
        self._live.stop()

    def _picture(self, event: StepEvent, device: str) -> Any:
        progress, text = self._progress, self._text
        cells = [text(f"step {progress.done}", style="bold")]
        if progress.total is not None:
            bar = self._bar(total=1.0, completed=progress.fraction, width=_BAR)
            cells = [bar, text(f"{progress.done}/{progress.total}", style="bold")]
        if progress.seconds_left is not None:
            cells.append(text(f"ETA {wording.clock(progress.seconds_left)}", style="cyan"))
        cells += [
            text(cell)
            for cell in wording.rates(
                event.tokens_per_second, event.tflops_per_device, device=device
            )
            if cell
        ]
        first = self._table.grid(padding=(0, 2))
        for _ in cells:
            first.add_column(no_wrap=True)
        first.add_row(*cells)
        loss, *others = [cell for cell in (*wording.losses(event), *wording.extras(event)) if cell]
        second = text.assemble((loss, "bold"), *(f"  {cell}" for cell in others))
        second.no_wrap, second.overflow = True, "ellipsis"
        return self._group(first, second)


def _rich(module: str) -> Any:
    return require(f"rich.{module}", extra="rich", sink="console")
