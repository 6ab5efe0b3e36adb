# SPDX-License-Identifier: Apache-2.0
"""Keeps what a sink raises away from everybody else."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from attrs import define, field

if TYPE_CHECKING:
    from mb_config.records import Event

    from mb_logging.interfaces import MetricSink

logger = logging.getLogger(__name__)


@define(kw_only=True, eq=False)
class GuardedSink:
    """A sink whose errors are logged instead of raised.

    The first error is reported, with where it came from; the sink is left out when *patience*
    records in a row have failed. One that succeeds starts the count anew, so that a file system
    that was away for a moment costs some records and not the rest of the run.

    Attributes:
        sink: The sink.
        patience: Failures in a row after which it is left out.
        lost: Records that it did not take.
        disabled: Whether it is left out.
    """

    sink: MetricSink
    patience: int = 3
    lost: int = field(default=0, init=False)
    disabled: bool = field(default=False, init=False)
    _in_a_row: int = field(default=0, init=False)

    @property
    def name(self) -> str:
        """The sink's type, for messages."""
        return type(self.sink).__name__

    def write(self, event: Event) -> None:
        """Hand *event* over; never raises."""
        if self.disabled:
            self.lost += 1
            return
        try:
            self.sink.write(event)
        except BaseException as error:  # noqa: BLE001 - not even sys.exit may end the others' thread
            self._count(event, error)
        else:
            self._in_a_row = 0

    def close(self) -> None:
        """Close the sink, left out or not; never raises."""
        try:
            self.sink.close()
        except BaseException:  # as in write
            logger.exception("%s could not be closed; its last records may be missing", self.name)
        if self.lost:
            logger.warning("%s did not take %d records of this run", self.name, self.lost)

    def _count(self, event: Event, error: BaseException) -> None:
        if not self.lost:
            logger.error(
                "%s failed on a %s and is left out if it fails %d times in a row; training goes on",
                self.name,
                type(event).__name__,
                self.patience,
                exc_info=error,
            )
        self.lost += 1
        self._in_a_row += 1
        if self._in_a_row >= self.patience:
            self.disabled = True
            logger.error(
                "%s failed %d times in a row and is left out from now on: %s: %s",
                self.name,
                self._in_a_row,
                type(error).__name__,
                error,
            )
