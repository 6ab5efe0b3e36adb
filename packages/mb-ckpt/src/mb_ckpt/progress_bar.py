# SPDX-License-Identifier: Apache-2.0
"""One line on a terminal that says how far a transfer of bytes is."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

_WIDTH = 24
_EVERY_S = 0.1


class ProgressBar:
    """Shows share, bytes, speed and remaining time; takes the line back when the work is over.

    Called with the bytes done and all there are. Where *stream* is no terminal it does nothing.

    Args:
        label: What is being done.
        stream: Where to; None for standard error.
        clock: Returns seconds.
    """

    def __init__(
        self,
        label: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._drawn: float | None = None
        self._shown = self._stream.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Draw the line anew, at most ten times a second and when all is done."""
        now = self._clock()
        fresh = self._drawn is not None and now - self._drawn < _EVERY_S
        if not self._shown or (fresh and done < total):
            return
        self._drawn = now
        share = done / total if total else 1.0
        seconds = now - self._started
        speed = done / seconds if seconds > 0 else 0.0
        left = _time((total - done) / speed) if speed else "--:--"
        bar = ("#" * int(share * _WIDTH)).ljust(_WIDTH, ".")
        self._write(
            f"\r\x1b[K{self._label} {share:4.0%} [{bar}] {size(done)} of {size(total)}, "
            f"{size(speed)}/s, {left} left"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn is not None:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def size(nbytes: float) -> str:
    """Return a number of bytes in words, such as ``3.2 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
