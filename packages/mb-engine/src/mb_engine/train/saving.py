# SPDX-License-Identifier: Apache-2.0
"""Saving while training goes on: one save in flight, failures reported and survived."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from attrs import define, field
from mb_config.records import SaveEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from mb_config.records import Event

    from mb_engine.interfaces import Checkpointer, SaveHandle

logger = logging.getLogger(__name__)


@define(kw_only=True, eq=False)
class BackgroundSaver:
    """Begins saves, keeps training from changing what is not staged yet, and reports the end.

    Attributes:
        checkpointer: Where to.
        path: The place in words, for reports.
        emit: Takes the records.
        blocking: Wait until each save is durable.
        refuse: Leave it to the checkpointer to refuse a save while one is in flight.
    """

    checkpointer: Checkpointer
    path: str
    emit: Callable[[Event], None]
    blocking: bool = False
    refuse: bool = False
    last_step: int = field(default=-1, init=False)
    failures: int = field(default=0, init=False)
    _handle: SaveHandle | None = field(default=None, init=False)
    _begun: float = field(default=0.0, init=False)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to save *state* as *step*; an earlier save is waited for, or this one refused."""
        if not self.refuse:
            self.finish()
        begun = time.perf_counter()
        try:
            handle = self.checkpointer.save(step, state)
        except Exception as error:  # noqa: BLE001 - a failed save must not end the training
            self._failed(step, error)
            return
        self.finish()
        self._handle, self._begun, self.last_step = handle, begun, step
        blocked = time.perf_counter() - begun
        self.emit(SaveEvent(step=step, path=self.path, status="started", seconds=blocked))
        if self.blocking:
            self.finish()

    def fence(self) -> None:
        """Return when parameters may change; call before every optimizer step."""
        if self._handle is None:
            return
        try:
            self._handle.wait_staged()
        except Exception as error:  # noqa: BLE001 - see save
            self._handle = None
            self._failed(self.last_step, error)
            return
        if self._handle.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if any, and report how it ended."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            handle.result()
        except Exception as error:  # noqa: BLE001 - see save
            self._failed(self.last_step, error)
            return
        seconds = time.perf_counter() - self._begun
        self.emit(SaveEvent(step=self.last_step, path=self.path, status="saved", seconds=seconds))

    def _failed(self, step: int, error: Exception) -> None:
        self.failures += 1
        message = " ".join(str(error).split()) or type(error).__name__
        logger.error("saving step %d failed, training goes on: %s", step, message)
        self.emit(SaveEvent(step=step, path=self.path, status="failed", error=message))
        if step == self.last_step:
            self.last_step = -1  # so that the end of the run tries again
