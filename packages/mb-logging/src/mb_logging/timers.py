# SPDX-License-Identifier: Apache-2.0
"""Where the time of a loop goes: named, nested spans."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from attrs import define, field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@define
class Span:
    """What one name took.

    Attributes:
        count: How often.
        total: Seconds in all.
        least: Seconds of the fastest.
        most: Seconds of the slowest.
    """

    count: int = 0
    total: float = 0.0
    least: float = float("inf")
    most: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.total += seconds
        self.least = min(self.least, seconds)
        self.most = max(self.most, seconds)


@define(kw_only=True)
class Timers:
    """Adds up spans by path: a span inside another is named ``outer/inner``.

    Attributes:
        clock: Returns seconds. On a GPU give one that synchronizes first, or times only what was
            queued.
        spans: By path.
    """

    clock: Callable[[], float] = time.perf_counter
    spans: dict[str, Span] = field(factory=dict)
    _path: list[str] = field(factory=list, init=False)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        self._path.append(name)
        path = "/".join(self._path)
        begun = self.clock()
        try:
            yield
        finally:
            self.spans.setdefault(path, Span()).add(self.clock() - begun)
            self._path.pop()
