# SPDX-License-Identifier: Apache-2.0
"""Where the time of a loop goes: named, nested spans."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mb_logging.interfaces import SpanClock

_MAX_PENDING = 10_000


class WallClock:
    """Time as the host sees it."""

    def mark(self) -> float:
        """Return now, in seconds."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Return the seconds between two marks."""
        return end - begin


@define(kw_only=True)
class Span:
    """What one name took; all times in seconds.

    Attributes:
        count: How often.
        total: In all.
        least: The fastest.
        most: The slowest.
    """

    count: int = 0
    total: float = 0.0
    least: float = float("inf")
    most: float = 0.0

    @property
    def mean(self) -> float:
        """Of one; 0 before there is one."""
        return self.total / self.count if self.count else 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.total += seconds
        self.least = min(self.least, seconds)
        self.most = max(self.most, seconds)


@frozen(kw_only=True)
class MinMax:
    """One span over all ranks: its total seconds on the fastest and on the slowest of them.

    Attributes:
        least: Seconds on the fastest rank.
        most: Seconds on the slowest rank.
        slowest_rank: Which one that is.
    """

    least: float
    most: float
    slowest_rank: int


@define(kw_only=True, eq=False)
class Timers:
    """Adds up spans by path: a span inside another is named ``outer/inner``.

    Timing waits for nothing: the clock's marks are kept, and read when :meth:`take` is called. So
    a clock may hand out CUDA events, which are known only when the device has come to them.

    Not thread-safe; give each thread its own.

    Attributes:
        clock: Takes the times; the host's clock if left out.
    """

    clock: SpanClock = field(factory=WallClock)
    _spans: dict[str, Span] = field(factory=dict, init=False)
    _pending: list[tuple[str, Any, Any]] = field(factory=list, init=False)
    _path: list[str] = field(factory=list, init=False)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what happens inside, an exception included."""
        self._path.append(name)
        path = "/".join(self._path)
        begin = self.clock.mark()
        try:
            yield
        finally:
            self._pending.append((path, begin, self.clock.mark()))
            self._path.pop()
            if len(self._pending) >= _MAX_PENDING:  # nobody asks; do not keep marks for ever
                self._read()

    def take(self) -> dict[str, Span]:
        """Return the spans since the last call, by path, in order of first end; begins anew."""
        self._read()
        spans, self._spans = self._spans, {}
        return spans

    def _read(self) -> None:
        pending, self._pending = self._pending, []
        for path, begin, end in pending:
            self._spans.setdefault(path, Span()).add(self.clock.seconds(begin, end))


def as_metrics(spans: Mapping[str, Span], *, prefix: str = "time/") -> dict[str, float]:
    """Return mean seconds by name, such as ``time/step/forward``, for ``StepEvent.metrics``."""
    return {prefix + path: span.mean for path, span in spans.items()}


def over_ranks(ranks: Sequence[Mapping[str, Span]]) -> dict[str, MinMax]:
    """Compare the totals of each path over ranks.

    Args:
        ranks: What :meth:`Timers.take` returned on each rank, in rank order, such as
            ``torch.distributed.all_gather_object`` fills in. A rank without a path, such as another
            pipeline stage, is left out of that path's comparison.

    Returns:
        The extremes by path.
    """
    paths = list(dict.fromkeys(path for spans in ranks for path in spans))
    result = {}
    for path in paths:
        totals = {rank: spans[path].total for rank, spans in enumerate(ranks) if path in spans}
        slowest = max(totals, key=totals.__getitem__)
        result[path] = MinMax(
            least=min(totals.values()), most=totals[slowest], slowest_rank=slowest
        )
    return result
