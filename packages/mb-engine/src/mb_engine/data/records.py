# SPDX-License-Identifier: Apache-2.0
"""Records of JSONL and Parquet files, each with its number, the broken ones with what is wrong."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from mb_engine.data import locations
from mb_engine.data.errors import DataError
from mb_engine.data.tokenizer_libraries import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

_SHOWN = 5


@frozen(kw_only=True)
class Record:
    """One record of a file.

    Attributes:
        number: Its line or row, counted from 1.
        value: Its fields; None if it is broken.
        problem: What is wrong with it, None if nothing.
    """

    number: int
    value: dict[str, Any] | None = None
    problem: str | None = None


@define(kw_only=True)
class BadRecords:
    """Counts records that cannot be used, or refuses the first.

    Attributes:
        setting: The option that decides, as the message should name it.
        skip: Count them and go on.
        found: How many.
        examples: Of the first few: file, number and reason.
    """

    setting: str
    skip: bool
    found: int = 0
    examples: list[str] = field(factory=list)

    def note(self, path: str, number: int, reason: str) -> None:
        """Take note of one.

        Raises:
            DataError: If they are not to be skipped.
        """
        text = f"{path}, {'row' if is_parquet(path) else 'line'} {number}: {reason}"
        if not self.skip:
            raise DataError(f"{text}; correct it, or set {self.setting}=skip to leave it out")
        self.found += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(text)


def is_parquet(path: str) -> bool:
    """Return whether *path* is named as a Parquet file is."""
    return path.endswith((".parquet", ".pq"))


def read_records(path: str) -> Iterator[Record]:
    """Yield the records of a JSONL file (possibly ``.gz``) or a Parquet file, in order.

    Blank lines are no records.

    Raises:
        DataError: If the file is missing, empty or unreadable as a whole.
    """
    if is_parquet(path):
        yield from _parquet(path)
        return
    empty = True
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    yield parse_line(number, line)
    except OSError as error:
        raise unreadable(path, error) from error
    if empty:
        raise DataError(f"{path} is empty; name a file with records")


def open_text(path: str) -> Any:
    """Return *path* opened for reading bytes, decompressed where it is named ``.gz``."""
    file = locations.open_bytes(path)
    return _Unzipped(file) if path.endswith(".gz") else file


class _Unzipped(gzip.GzipFile):
    """Closes the compressed file with itself, as ``gzip.open`` does for paths alone."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(fileobj=file, mode="rb")
        self.myfileobj = file  # type: ignore[assignment]


def parse_line(number: int, line: bytes) -> Record:
    """Return the record that one line of JSONL holds."""
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return Record(number=number, problem=f"not UTF-8 at byte {error.start} of the line")
    except ValueError as error:
        return Record(number=number, problem=f"not JSON ({error})")
    except RecursionError:
        return Record(number=number, problem="nested too deeply")
    if not isinstance(value, dict):
        return Record(number=number, problem=f"a JSON {type(value).__name__}, not an object")
    return Record(number=number, value=value)


def unreadable(path: str, error: Exception) -> DataError:
    """Return the error for a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return DataError(
            f"{path} does not exist; correct the path (it is relative to the working directory)"
        )
    reason = getattr(error, "strerror", None) or [*str(error).splitlines(), ""][0]
    return DataError(f"{path} cannot be read ({reason}); name a file that can be read")


def _parquet(path: str) -> Iterator[Record]:
    require("pyarrow", setting=f"{path}: Parquet")
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(locations.arrow_file(path)) as file:
            if not file.metadata.num_rows:
                raise DataError(f"{path} is empty; name a file with records")
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number=number, value=without_nulls(row))
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def without_nulls(value: Any) -> Any:
    """Return *value* without keys whose value is None, at any depth.

    Parquet gives all rows of a column the same fields; a template asks which a message has.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value
