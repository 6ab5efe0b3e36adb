# SPDX-License-Identifier: Apache-2.0
"""A run's records as curves: what counts when parts of a run overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field, frozen
from mb_config.records import EvalEvent, RunInfo, StepEvent

if TYPE_CHECKING:
    from mb_config.records import Event


@frozen
class TrainPoint:
    """What a curve needs of one step.

    Attributes:
        loss: Mean loss a token, in nats.
        learning_rate: Of that step.
    """

    loss: float
    learning_rate: float


@define
class Curves:
    """Training and validation over steps.

    A run that is resumed at step *n*, or a loop that counts back to *n*, does what comes after *n*
    again: the earlier points beyond are left out.

    Attributes:
        train: Points by step, ascending.
        validation: Loss by step, ascending, by name of the data set.
    """

    train: dict[int, TrainPoint] = field(factory=dict)
    validation: dict[str, dict[int, float]] = field(factory=dict)
    _last: int = field(default=-1, init=False, eq=False)

    def add(self, event: Event) -> None:
        """Take a record; those without points are passed over."""
        if isinstance(event, RunInfo):
            self._forget_after(event.start_step)
        elif isinstance(event, StepEvent):
            if event.step <= self._last:
                self._forget_after(event.step - 1)
            self.train[event.step] = TrainPoint(event.loss, event.learning_rate)
            self._last = event.step
        elif isinstance(event, EvalEvent):
            points = self.validation.setdefault(event.name, {})
            points.pop(event.step, None)
            points[event.step] = event.loss

    def _forget_after(self, step: int) -> None:
        self.train = {s: point for s, point in self.train.items() if s <= step}
        self.validation = {
            name: kept
            for name, points in self.validation.items()
            if (kept := {s: loss for s, loss in points.items() if s <= step})
        }
        self._last = min(self._last, step)
