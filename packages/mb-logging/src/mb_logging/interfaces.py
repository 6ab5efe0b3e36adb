# SPDX-License-Identifier: Apache-2.0
"""What this package asks of others. Implementers match by shape and import nothing from here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from mb_config.records import Event


@runtime_checkable
class MetricSink(Protocol):
    """Takes the records of a run, one at a time, on the recorder's own thread.

    It may be slow and it may raise: the recorder keeps both away from training.
    """

    def write(self, event: Event) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Finish; called once, after the last record."""
        ...


class SpanClock(Protocol):
    """Takes times for :class:`mb_logging.timers.Timers`.

    One for CUDA records an event in ``mark``, and in ``seconds`` waits for the second event and
    returns ``begin.elapsed_time(end) / 1000``.
    """

    def mark(self) -> Any:
        """Return a mark of now; must not wait for a device."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks; may wait until both have come to pass."""
        ...
