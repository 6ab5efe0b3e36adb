# SPDX-License-Identifier: Apache-2.0
"""One JSON object a line; see :mod:`mb_logging.encoding` for the format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from mb_logging.encoding import encode

if TYPE_CHECKING:
    from os import PathLike

    from mb_config.records import Event


class JSONL:
    """Appends to a file; every record is in it as soon as it is written.

    A resumed run goes on in the same file. A last line that a crash cut off is ended first, so
    that it spoils no other.

    Args:
        path: The file; folders are made.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def write(self, event: Event) -> None:
        """Append *event*."""
        self._file.write(encode(event, time=time.time()) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last line end: half a record, of a process that was killed."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
