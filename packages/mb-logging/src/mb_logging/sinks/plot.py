# SPDX-License-Identifier: Apache-2.0
"""A picture of the loss, drawn anew at every evaluation and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mb_config.records import EvalEvent, RunInfo, StepEvent

from mb_logging.encoding import read_events
from mb_logging.errors import make_folder, require
from mb_logging.plots import curves_of, draw

if TYPE_CHECKING:
    from os import PathLike

    from mb_config.records import Event


class Plot:
    """Draws loss and learning rate; see :func:`mb_logging.plots.plot_events`.

    Args:
        picture: The file to write.
        history: A metrics file with what earlier parts of a resumed run reported, if any.
        title: Above the picture; the run's name if None.

    Raises:
        LoggingError: If matplotlib is not installed, or *history* cannot be read.
    """

    def __init__(
        self,
        picture: str | PathLike[str],
        *,
        history: str | PathLike[str] | None = None,
        title: str | None = None,
    ) -> None:
        # Now, while nothing trains yet: it takes a second.
        require("matplotlib.backends.backend_agg", extra="plot", sink="plot")
        self.picture = Path(picture)
        make_folder(self.picture.parent, sink="plot")
        earlier = history if history is not None and Path(history).is_file() else None
        self._curves = curves_of(read_events(earlier) if earlier is not None else ())
        self._given_title = title
        self._title = title or ""
        self._stale = False

    def write(self, event: Event) -> None:
        """Keep *event*, and draw after an evaluation."""
        self._curves.add(event)
        self._stale = self._stale or isinstance(event, (StepEvent, EvalEvent))
        if isinstance(event, RunInfo) and self._given_title is None:
            self._title = event.run_name
        if isinstance(event, EvalEvent):
            self._draw()

    def close(self) -> None:
        """Draw what was not drawn yet."""
        self._draw()

    def _draw(self) -> None:
        if self._stale and self._curves.train:
            draw(self._curves, self.picture, title=self._title)
            self._stale = False
