# SPDX-License-Identifier: Apache-2.0
"""What a person sees: a live bar on a terminal, one line a report elsewhere."""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent

from mb_logging import wording
from mb_logging.progress import Progress
from mb_logging.sinks.displays import PlainLines, TextBar

if TYPE_CHECKING:
    from collections.abc import Callable

    from mb_config.records import Event

    from mb_logging.sinks.displays import Display


class Console:
    """Shows every record; on a terminal, steps become a bar that is drawn over itself.

    The bar is rich's where rich is installed. Where the stream is no terminal (a file, a pipe, a
    notebook, ``TERM=dumb``) a step becomes an aligned line, *interval_s* after the last one at the
    earliest; the first and the last step, and the one before an evaluation or a save, always do.

    Args:
        total: Steps of the whole run, for the bar and the time left; taken from ``RunInfo`` if None.
        stream: Where to; standard output if None.
        interval_s: Seconds between two step lines where there is no terminal.
        clock: Seconds of any clock that does not go back.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        stream: TextIO | None = None,
        interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stdout if stream is None else stream
        self._given_total = total
        self._progress = Progress(total=total, clock=clock)
        self._display = _display(stream, self._progress, interval_s=interval_s, clock=clock)
        self._device = ""

    def write(self, event: Event) -> None:
        """Show *event*."""
        if isinstance(event, StepEvent):
            self._progress.add(event)
            self._display.step(event, device=self._device)
        elif isinstance(event, RunInfo):
            self._device = event.device
            if self._given_total is None:
                self._progress.total = event.total_steps
            self._progress.restart(start_step=event.start_step)
            self._display.line(wording.run_line(event), style="bold")
        elif isinstance(event, EvalEvent):
            self._at(event.step, wording.eval_line(event), style="green")
        elif isinstance(event, SaveEvent):
            text = wording.save_line(event)
            if text is not None:
                self._at(event.step, text, style="bold red" if event.error else "dim")
        elif isinstance(event, RunEnd):
            self._display.close()  # the bar stays above the line that ends it
            self._display.line(
                wording.end_line(event), style="bold red" if event.exit_code else "bold"
            )

    def close(self) -> None:
        """Leave the last state on the stream; a second call does nothing."""
        self._display.close()

    def _at(self, step: int, text: str, *, style: str) -> None:
        self._display.line(f"step {step:>6}  {text}", style=style)


def _display(
    stream: TextIO, progress: Progress, *, interval_s: float, clock: Callable[[], float]
) -> Display:
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return PlainLines(stream, progress, interval_s=interval_s, clock=clock)
    if find_spec("rich") is None:
        return TextBar(stream, progress)
    from mb_logging.sinks.rich_bar import RichBar

    return RichBar(stream, progress)
