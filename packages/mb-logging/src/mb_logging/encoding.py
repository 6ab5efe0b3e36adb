# SPDX-License-Identifier: Apache-2.0
"""Records as JSON and back.

One object a record: ``kind`` (``run``, ``step``, ``eval``, ``save`` or ``end``), ``time`` (seconds
since the epoch) and the record's fields. JSON has no nan and no infinity: they are written as the
strings ``"nan"``, ``"inf"`` and ``"-inf"``, and read back as numbers.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import attrs
from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mb_config.records import Event

KINDS: dict[str, type] = {
    "run": RunInfo,
    "step": StepEvent,
    "eval": EvalEvent,
    "save": SaveEvent,
    "end": RunEnd,
}
_NAMES = {cls: kind for kind, cls in KINDS.items()}


def encode(event: Event, *, time: float) -> str:
    """Return *event* as one line of JSON, without a line end.

    Args:
        event: A record.
        time: When it was taken, seconds since the epoch.
    """
    fields = {a.name: getattr(event, a.name) for a in attrs.fields(type(event))}
    record = {"kind": _NAMES[type(event)], "time": round(time, 3), **fields}
    return json.dumps(_finite(record), allow_nan=False)


def decode(line: str) -> Event:
    """Return the record of one line; fields of a later version are left out.

    Raises:
        ValueError: If the line is not a record.
    """
    data = json.loads(line)
    if not isinstance(data, dict) or data.get("kind") not in KINDS:
        raise ValueError("not a record: no known 'kind'")
    cls = KINDS[data["kind"]]
    known = attrs.fields_dict(cls)
    record: Event = cls(**{k: _number(v, known[k]) for k, v in data.items() if k in known})
    return record


def read_events(path: Path) -> Iterator[Event]:
    """Yield the records of a metrics file; a last line cut off by a crash is left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield decode(line)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _number(value: Any, attribute: Any) -> Any:
    if isinstance(value, dict) and attribute.name == "metrics":
        return {k: float(v) for k, v in value.items()}
    if isinstance(value, str) and "float" in str(attribute.type):
        return float(value)
    return value
