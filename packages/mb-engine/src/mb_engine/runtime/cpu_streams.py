# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for CUDA streams and events on a CPU, where a call returns when its work is done."""

from __future__ import annotations

from typing import Any


class Stream:
    """A CUDA stream of a CPU: work is done when the call returns, so there is never a wait."""

    def __init__(self, device: Any = None, priority: int = 0, **_kwargs: Any) -> None:
        del device, priority

    def wait_stream(self, stream: Stream) -> None:
        """Return at once."""

    def wait_event(self, event: Event) -> None:
        """Return at once."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return *event*, or a new one."""
        return event or Event()

    def synchronize(self) -> None:
        """Return at once."""


class Event:
    """A CUDA event of a CPU: it has always happened already."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None:
        """Return at once."""

    def wait(self, stream: Stream | None = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True."""
        return True
