# SPDX-License-Identifier: Apache-2.0
"""Hands records to sinks behind the back of the training loop."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Self

from mb_config.records import RunEnd, RunInfo, StepEvent

if TYPE_CHECKING:
    from types import TracebackType

    from mb_config.records import Event

    from mb_logging.interfaces import MetricSink

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3


class Recorder:
    """Gives every record to every sink, on one background thread.

    A slow sink never makes training wait: when *capacity* records are waiting, the oldest step
    records are dropped and counted; other kinds are never dropped. A sink that raises is reported
    in the log, and left out after three failures. Nothing is ever raised into training.

    Use it as a context manager, or call :meth:`close`; both wait for the sinks, at most
    *flush_timeout_s*.

    Args:
        sinks: Where records go.
        capacity: Records that may wait.
        flush_timeout_s: Seconds that ``close`` waits.
    """

    def __init__(
        self, *sinks: MetricSink, capacity: int = 1024, flush_timeout_s: float = 30.0
    ) -> None:
        self.dropped = 0
        self._sinks = list(sinks)
        self._failures = dict.fromkeys(map(id, sinks), 0)
        self._capacity = capacity
        self._flush_timeout_s = flush_timeout_s
        self._waiting: deque[Event] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._tokens = 0
        self._last = time.perf_counter()
        self._thread = threading.Thread(target=self._work, name="mb-logging", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Return the recorder."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the sinks, whatever happened."""
        self.close()

    def on_event(self, event: Event) -> None:
        """Take one record; returns at once."""
        with self._wake:
            if self._closing:
                return
            if len(self._waiting) >= self._capacity:
                self._drop_one()
            self._waiting.append(event)
            self._wake.notify()

    def step(
        self, step: int, *, loss: float, tokens: int = 0, lr: float = 0.0, **more: float
    ) -> None:
        """Record one step of a loop of one's own.

        Args:
            step: Steps done, this one included.
            loss: Mean loss a token.
            tokens: Tokens of this step over all ranks.
            lr: Learning rate.
            more: ``grad_norm``, and further numbers by name.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._tokens += tokens
        grad_norm = more.pop("grad_norm", None)
        self.on_event(
            StepEvent(
                step=step,
                consumed_samples=0,
                consumed_tokens=self._tokens,
                loss=float(loss),
                learning_rate=lr,
                grad_norm=grad_norm,
                seconds=seconds,
                tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
                metrics={name: float(value) for name, value in more.items()},
            )
        )

    def close(self) -> None:
        """Write what waits, close the sinks and end the thread; a second call does nothing."""
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._wake.notify()
        self._thread.join(self._flush_timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "sinks did not finish in %.0f s; the last records are lost", self._flush_timeout_s
            )
        if self.dropped:
            logger.warning("%d step records were dropped: a sink is too slow", self.dropped)

    def _drop_one(self) -> None:
        for index, event in enumerate(self._waiting):
            if isinstance(event, StepEvent):
                del self._waiting[index]
                self.dropped += 1
                return

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                if not self._waiting:
                    break
                event = self._waiting.popleft()
            for sink in list(self._sinks):
                self._write(sink, event)
        for sink in self._sinks:
            try:
                sink.close()
            except Exception:
                logger.exception("closing %s failed", type(sink).__name__)

    def _write(self, sink: MetricSink, event: Event) -> None:
        try:
            sink.write(event)
        except Exception as error:
            failures = self._failures[id(sink)] = self._failures[id(sink)] + 1
            logger.exception("%s failed on a record", type(sink).__name__)
            lifecycle = isinstance(event, (RunInfo, RunEnd))
            if failures >= _MAX_FAILURES and not lifecycle:
                logger.warning(
                    "%s failed %d times and is left out from now on: %s",
                    type(sink).__name__,
                    failures,
                    error,
                )
                self._sinks.remove(sink)
