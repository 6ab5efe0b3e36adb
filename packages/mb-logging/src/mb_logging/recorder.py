# SPDX-License-Identifier: Apache-2.0
"""Hands records to sinks behind the back of the training loop."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Self, SupportsFloat, SupportsInt

from mb_config.records import RunEnd, StepEvent

from mb_logging.guard import GuardedSink
from mb_logging.own_loop import OwnLoop

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from mb_config.records import Event

    from mb_logging.interfaces import MetricSink

logger = logging.getLogger(__name__)


class Recorder:
    """Gives every record to every sink, in order, on one background thread.

    A slow sink never makes training wait: when *capacity* records are waiting, the oldest step
    record gives way and is counted in ``dropped``; records of other kinds are never dropped. A sink
    that raises is reported in the log, and left out when it has failed three times in a row; the
    others go on. Nothing is ever raised into training.

    It is a callback of mb-engine by its shape (``on_event``, ``close``), and a context manager for
    a loop of one's own, with :meth:`step` and :meth:`evaluation`. Leaving the context, ``close`` and
    the end of the process all write what still waits; they wait for the sinks *flush_timeout_s* at
    most. What comes after ``close`` is passed over.

    Args:
        sinks: Where records go.
        capacity: Records that may wait.
        flush_timeout_s: Seconds that ``close`` waits.
        flops_per_token: Model FLOPs of forward and backward of one token, for ``step`` to report
            TFLOP/s; 0 where unknown.
        num_devices: Devices that share the work of ``step``.
        clock: Seconds of any clock that does not go back, for ``step``.
    """

    def __init__(
        self,
        *sinks: MetricSink,
        capacity: int = 1024,
        flush_timeout_s: float = 30.0,
        flops_per_token: float = 0.0,
        num_devices: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1")
        self.dropped = 0
        self._sinks = [GuardedSink(sink=sink) for sink in sinks]
        self._capacity = capacity
        self._flush_timeout_s = flush_timeout_s
        self._loop = OwnLoop(flops_per_token=flops_per_token, num_devices=num_devices, clock=clock)
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="mb-logging", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        """Return the recorder."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Record the end of a loop of one's own and close, whatever happened."""
        if self._loop.steps and not self._ended:
            self.on_event(self._loop.end(error))
        self.close()

    def on_event(self, event: Event) -> None:
        """Take one record; returns at once and never raises."""
        with self._changed:
            if self._closing:
                return
            if len(self._waiting) >= self._capacity:
                self._drop_one()
            self._ended = isinstance(event, RunEnd)
            self._waiting.append(event)
            self._changed.notify_all()

    def step(
        self,
        step: int,
        *,
        loss: SupportsFloat,
        tokens: SupportsInt = 0,
        samples: SupportsInt = 0,
        lr: SupportsFloat = 0.0,
        grad_norm: SupportsFloat | None = None,
        **metrics: SupportsFloat,
    ) -> None:
        """Record one step of a loop of one's own; it is timed from the last call to this one.

        Numbers may be 0-d tensors; reading one from a GPU waits for it, so call this every few
        steps there.

        Args:
            step: Number of the step, counted from 0 or 1.
            loss: Mean loss a token, in nats.
            tokens: Tokens since the last call, over all ranks.
            samples: Samples since the last call, over all ranks.
            lr: Learning rate.
            grad_norm: Norm of the gradient before clipping.
            metrics: Further numbers by name.
        """
        event = self._loop.step(
            step,
            loss=loss,
            tokens=tokens,
            samples=samples,
            lr=lr,
            grad_norm=grad_norm,
            metrics=metrics,
        )
        self.on_event(event)

    def evaluation(
        self,
        step: int,
        *,
        loss: SupportsFloat,
        name: str = "validation",
        tokens: SupportsInt = 0,
        **metrics: SupportsFloat,
    ) -> None:
        """Record an evaluation of a loop of one's own; its time counts for no step.

        Args:
            step: The step it came after.
            loss: Mean loss a token, in nats.
            name: Name of the data set.
            tokens: Tokens the mean covers.
            metrics: Further numbers by name.
        """
        event = self._loop.evaluation(step, loss=loss, name=name, tokens=tokens, metrics=metrics)
        self.on_event(event)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the sinks took every record; return False if *timeout_s* was not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._busy), timeout_s)

    def close(self) -> None:
        """Write what waits, close the sinks and end the thread; a second call does nothing."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        atexit.unregister(self.close)
        if threading.current_thread() is self._thread:  # a sink did it; what waits is still written
            return
        self._thread.join(self._flush_timeout_s)
        if self._thread.is_alive():
            with self._changed:
                left = len(self._waiting) + self._busy
            logger.warning(
                "the sinks were not done after %g s; %d records may be lost",
                self._flush_timeout_s,
                left,
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
        while (event := self._next()) is not None:
            for sink in self._sinks:
                sink.write(event)
        for sink in self._sinks:
            sink.close()

    def _next(self) -> Event | None:
        """Return the oldest record when there is one, None when there will be none any more."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            self._busy = True
            return self._waiting.popleft()
