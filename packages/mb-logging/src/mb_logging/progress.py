# SPDX-License-Identifier: Apache-2.0
"""How far a run is and how long it will take."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from attrs import define, field

if TYPE_CHECKING:
    from collections.abc import Callable

    from mb_config.records import StepEvent


@define(kw_only=True, eq=False)
class Progress:
    """Follows the steps of a run.

    A loop whose first step is number 0 counts from there, so its step *n* is the *n + 1*-th.

    Attributes:
        total: Steps of the whole run, None if only something else ends it.
        clock: Seconds of any clock that does not go back.
        done: Steps done, those of earlier parts of a resumed run included.
        seconds_left: Until the end, None where unknown. It is the time since the first report,
            evaluations and saves included, drawn out to the end; the time before that report, in
            which a run warms up, does not count.
    """

    total: int | None = None
    clock: Callable[[], float] = time.monotonic
    done: int = field(default=0, init=False)
    seconds_left: float | None = field(default=None, init=False)
    _from_zero: bool | None = field(default=None, init=False)
    _first: tuple[int, float] | None = field(default=None, init=False)

    def restart(self, *, start_step: int) -> None:
        """Begin a part of a run, *start_step* steps having been done before."""
        self.done, self.seconds_left = start_step, None
        self._from_zero, self._first = None, None

    def add(self, event: StepEvent) -> None:
        """Count a report."""
        if self._from_zero is None:
            self._from_zero = event.step == 0
        self.done = event.step + self._from_zero
        now = self.clock()
        if self._first is None:
            self._first = (self.done, now)
        steps, since = self._first
        per_step = (now - since) / (self.done - steps) if self.done > steps else event.seconds
        if self.total is not None and per_step > 0:
            self.seconds_left = per_step * max(0, self.total - self.done)

    @property
    def fraction(self) -> float:
        """Of the run that is done, from 0 to 1; 0 where the end is not known."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def is_complete(self) -> bool:
        """Whether the last step is done."""
        return self.total is not None and self.done >= self.total
