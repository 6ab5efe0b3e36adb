# SPDX-License-Identifier: Apache-2.0
"""Records as JSON and back.

One object a record: ``kind`` (``run``, ``step``, ``eval``, ``save`` or ``end``), ``time`` (seconds
since the epoch) and the record's fields. JSON has no nan and no infinity: they are written as the
strings ``"nan"``, ``"inf"`` and ``"-inf"``. Reading turns them into numbers again wherever a
record has a number; in ``RunInfo.config``, where anything may be, they stay strings.
"""

from __future__ import annotations

import json
import logging
import math
import operator
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

import attrs
from attrs import frozen
from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent

from mb_logging.errors import LoggingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from mb_config.records import Event

logger = logging.getLogger(__name__)

KINDS: dict[str, type] = {
    "run": RunInfo,
    "step": StepEvent,
    "eval": EvalEvent,
    "save": SaveEvent,
    "end": RunEnd,
}
_NAMES = {cls: kind for kind, cls in KINDS.items()}


@frozen
class Stamped:
    """A record and when it was written.

    Attributes:
        time: Seconds since the epoch; 0 where the file does not say.
        event: The record.
    """

    time: float
    event: Event


def encode(event: Event, *, time: float) -> str:
    """Return *event* as one line of JSON, without a line end.

    Args:
        event: A record.
        time: When it was taken, seconds since the epoch.
    """
    fields = {a.name: getattr(event, a.name) for a in attrs.fields(type(event))}
    record = {"kind": _NAMES[type(event)], "time": round(time, 3), **fields}
    return json.dumps(plain(record), allow_nan=False)


def decode(line: str) -> Event:
    """Return the record of one line; fields of a later version are left out.

    Raises:
        ValueError: If the line is not a record.
    """
    return decode_stamped(line).event


def read_events(path: str | PathLike[str]) -> Iterator[Event]:
    """Yield the records of a metrics file, in the order of the file.

    A last line that a crash cut off is left out silently. Other lines that are no records are left
    out too, and counted in a warning at the end.

    Raises:
        LoggingError: If the file cannot be read.
    """
    for stamped in read_stamped(path):
        yield stamped.event


def read_stamped(path: str | PathLike[str]) -> Iterator[Stamped]:
    """Yield the records of a metrics file with their times; see :func:`read_events`."""
    unreadable: list[int] = []
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 - any PathLike
            for number, line in enumerate(lines, start=1):
                try:
                    yield decode_stamped(line)
                except ValueError:
                    if line.endswith("\n") and line.strip():
                        unreadable.append(number)
    except OSError as error:
        raise LoggingError(
            f"{path}: cannot be read ({error.strerror}); give a file that the jsonl sink wrote"
        ) from error
    if unreadable:
        first = f"line {unreadable[0]}" + (" is the first" if len(unreadable) > 1 else "")
        logger.warning("%s: %d lines are no records; %s", path, len(unreadable), first)


def decode_stamped(line: str) -> Stamped:
    """Return the record of one line and when it was written.

    Raises:
        ValueError: If the line is not a record.
    """
    data = json.loads(line)
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError("not a record: no known 'kind'")
    cls = KINDS[kind]
    known = attrs.fields_dict(cls)
    try:
        fields = {k: _field(v, known[k]) for k, v in data.items() if k in known}
        return Stamped(float(data.get("time", 0.0)), cls(**fields))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"not a record: {error}") from error


def plain(value: Any) -> Any:
    """Return *value* as what JSON can hold; nan and infinities as strings."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, SupportsIndex):  # numpy's and torch's integers, exactly
        with suppress(TypeError, ValueError):  # their other numbers have the method, and refuse
            return operator.index(value)
    if isinstance(value, SupportsFloat):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    return str(value)


def _field(value: Any, attribute: Any) -> Any:
    """Return *value* as the record has it.

    Raises:
        TypeError: If the record can have no such value.
    """
    wanted = str(attribute.type)
    if value is None and "None" in wanted:
        return None
    if attribute.name == "metrics" and isinstance(value, dict):
        return {k: float(v) for k, v in value.items()}
    if wanted.startswith("float"):
        return float(value)
    plain_type = int if wanted.startswith("int") else dict if "Mapping" in wanted else str
    if not isinstance(value, plain_type):
        raise TypeError(f"{attribute.name}={value!r} must be {plain_type.__name__}")
    return value
