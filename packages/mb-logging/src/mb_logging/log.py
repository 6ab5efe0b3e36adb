# SPDX-License-Identifier: Apache-2.0
"""The standard library's logging for a job of many ranks: who said it, in which run, at which step."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, TextIO

from attrs import define
from mb_config.records import RunInfo, StepEvent

if TYPE_CHECKING:
    from collections.abc import Collection

    from mb_config.records import Event

_TEXT = "%(asctime)s %(levelname)s [%(where)s] %(name)s: %(message)s"


@define(kw_only=True)
class LogContext:
    """What every line of the log says besides its message; change it at any time.

    It has the shape of a callback: given to a training run, it follows the run's steps.

    Attributes:
        rank: This process.
        run_id: The run; empty for none.
        step: Optimizer steps reported last, None before the first.
    """

    rank: int = 0
    run_id: str = ""
    step: int | None = None

    def on_event(self, event: Event) -> None:
        """Follow a run; its name becomes the run id where there is none."""
        if isinstance(event, RunInfo):
            self.run_id = self.run_id or event.run_name
            self.step = event.start_step
        elif isinstance(event, StepEvent):
            self.step = event.step

    def words(self) -> str:
        """Return it for a line, such as ``"run7 rank 0 step 120"``."""
        step = "" if self.step is None else f"step {self.step}"
        return " ".join(word for word in (self.run_id, f"rank {self.rank}", step) if word)


class ContextFilter(logging.Filter):
    """Adds rank, run id and step to records; keeps a rank that should be silent to warnings.

    Args:
        context: What to add.
        ranks: Ranks that may log below WARNING; None for all.
    """

    def __init__(self, context: LogContext, ranks: Collection[int] | None = (0,)) -> None:
        super().__init__()
        self._context = context
        self._silent = ranks is not None and context.rank not in ranks

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether *record* is to be printed; adds the context to it."""
        context = self._context
        record.rank, record.run_id, record.step = context.rank, context.run_id, context.step
        record.where = context.words()
        return not self._silent or record.levelno >= logging.WARNING


class JSONFormatter(logging.Formatter):
    """One JSON object a line: time, level, rank, run_id, step, logger, message, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return *record* as a line; it has gone through a :class:`ContextFilter`."""
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname,
            **{name: getattr(record, name) for name in ("rank", "run_id", "step")},
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure_logging(
    *,
    level: int | str = "INFO",
    rank: int | None = None,
    ranks: Collection[int] | None = (0,),
    run_id: str = "",
    as_json: bool = False,
    stream: TextIO | None = None,
    logger: str = "",
) -> LogContext:
    """Let a logger, and those below it, print to one stream with rank, run id and step.

    A second call for the same logger takes the place of the first; handlers of others stay.

    Args:
        level: Least level to print.
        rank: This process; the environment's ``RANK`` (torchrun sets it) or 0 if None.
        ranks: Ranks that may print below WARNING; None for all.
        run_id: Of the run; empty for none.
        as_json: Print JSON instead of text.
        stream: Where to; standard error if None.
        logger: Name of the logger; the root if empty.

    Returns:
        The context; set its ``step``, or give it to a run as a callback.

    Raises:
        ValueError: If *level* is not a level.
    """
    context = LogContext(
        rank=int(os.environ.get("RANK", "0")) if rank is None else rank, run_id=run_id
    )
    handler = _Handler(stream)
    handler.addFilter(ContextFilter(context, ranks))
    handler.setFormatter(JSONFormatter() if as_json else logging.Formatter(_TEXT))
    target = logging.getLogger(logger)
    target.setLevel(level)
    for other in [h for h in target.handlers if isinstance(h, _Handler)]:
        target.removeHandler(other)
    target.addHandler(handler)
    return context


class _Handler(logging.StreamHandler[TextIO]):
    """Tells our handler from those of others."""
