# SPDX-License-Identifier: Apache-2.0
"""A picture of the loss, drawn anew at every evaluation and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mb_config.records import EvalEvent, StepEvent

from mb_logging.encoding import read_events
from mb_logging.errors import require
from mb_logging.plots import plot_events

if TYPE_CHECKING:
    from os import PathLike

    from mb_config.records import Event


class Plot:
    """Draws loss and learning rate; see :func:`mb_logging.plots.plot_events`.

    Args:
        picture: The file to write.
        history: A metrics file with what earlier parts of a resumed run reported, if any.

    Raises:
        LoggingError: If matplotlib is not installed.
    """

    def __init__(
        self, picture: str | PathLike[str], *, history: str | PathLike[str] | None = None
    ) -> None:
        require("matplotlib", extra="plot", sink="plot")
        self.picture = Path(picture)
        self.picture.parent.mkdir(parents=True, exist_ok=True)
        earlier = Path(history) if history is not None else None
        self._events: list[Event] = (
            [e for e in read_events(earlier) if isinstance(e, (StepEvent, EvalEvent))]
            if earlier is not None and earlier.is_file()
            else []
        )

    def write(self, event: Event) -> None:
        """Keep *event*, and draw after an evaluation."""
        if isinstance(event, (StepEvent, EvalEvent)):
            self._events.append(event)
        if isinstance(event, EvalEvent):
            self._draw()

    def close(self) -> None:
        """Draw for the last time."""
        self._draw()

    def _draw(self) -> None:
        if any(isinstance(e, StepEvent) for e in self._events):
            plot_events(self._events, self.picture)
