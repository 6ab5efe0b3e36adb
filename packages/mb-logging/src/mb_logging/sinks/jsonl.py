# SPDX-License-Identifier: Apache-2.0
"""One JSON object a line; see :mod:`mb_logging.encoding` for the format."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mb_logging.encoding import encode
from mb_logging.errors import LoggingError, make_folder

if TYPE_CHECKING:
    from io import FileIO
    from os import PathLike

    from mb_config.records import Event

_BLOCK = 1 << 16


class JSONL:
    """Appends to a file; every record is in it, whole, as soon as it is written.

    A resumed run goes on in the same file. Half a line, left by a process that was killed or by a
    disk that was full, is cut off before the next record, so that it spoils no other.

    Args:
        path: The file; folders are made.

    Raises:
        LoggingError: If the file cannot be opened.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        make_folder(self.path.parent, sink="jsonl")
        try:
            self._file: FileIO = self.path.open("ab+", buffering=0)
        except OSError as error:
            raise LoggingError(
                f"{self.path}: the jsonl sink cannot open this file ({error.strerror});"
                " give one that can be written"
            ) from error
        self._torn = True

    def write(self, event: Event) -> None:
        """Append *event* in one write.

        Raises:
            OSError: If the disk is full or gone; the file stays readable.
        """
        line = (encode(event, time=time.time()) + "\n").encode()
        if self._torn:
            _mend(self._file)
        self._torn = True
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: the disk took {written} of {len(line)} bytes; is it full?")
        self._torn = False

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def _mend(file: FileIO) -> None:
    """End a last line that only lacks its line end, and cut off one that is half a record."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start and b"\n" not in tail:
        start = max(0, start - _BLOCK)
        file.seek(start)
        tail = file.read(end - start)
    line = tail[tail.rfind(b"\n") + 1 :]
    if not line:
        return
    try:
        json.loads(line)
    except ValueError:
        file.truncate(end - len(line))
    else:
        file.write(b"\n")
