# SPDX-License-Identifier: Apache-2.0
"""What the recorder asks of a sink. Implementers match it by shape and import nothing from here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

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
