# SPDX-License-Identifier: Apache-2.0
"""The command ``mb-log``: look at a metrics file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from attrs import asdict
from mb_config.errors import UserError
from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent

from mb_logging import wording
from mb_logging.__about__ import __version__
from mb_logging.encoding import Stamped, decode_stamped, plain, read_events
from mb_logging.errors import LoggingError
from mb_logging.plots import plot_metrics
from mb_logging.progress import Progress
from mb_logging.sinks.displays import aligned
from mb_logging.summary import as_lines, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_POLL_S = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after one line on standard error if it cannot."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except UserError as error:
        sys.stderr.write(f"mb-log: {error}\n")
        return 2
    except BrokenPipeError:  # such as by "| head"
        sys.stderr.close()
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mb-log", description="Look at the metrics of a run.")
    parser.add_argument("--version", action="version", version=f"mb-log {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("summary", _summary, "say what came out of a run"),
        ("tail", _tail, "print the last records as the console would"),
        ("plot", _plot, "draw loss and learning rate"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("metrics", type=Path, help="a file that the jsonl sink wrote")
        command.set_defaults(run=run)
        if name == "summary":
            command.add_argument("--json", action="store_true", help="print JSON")
        if name == "tail":
            command.add_argument("-n", "--lines", type=int, default=20, help="how many records")
            command.add_argument(
                "-f", "--follow", action="store_true", help="go on until the run ends"
            )
        if name == "plot":
            command.add_argument(
                "picture", type=Path, nargs="?", help="where to; loss.png beside it if left out"
            )
            command.add_argument("--title", default="", help="above the picture")
    return parser


def _summary(options: argparse.Namespace) -> None:
    summary = summarize(read_events(options.metrics))
    if not (summary.parts or summary.step or summary.first_loss is not None):
        raise LoggingError(f"{options.metrics}: no records; give a file that the jsonl sink wrote")
    if options.json:
        _print(json.dumps(plain(asdict(summary)), indent=1, allow_nan=False))
        return
    for line in as_lines(summary):
        _print(line)


def _plot(options: argparse.Namespace) -> None:
    picture = options.picture or options.metrics.with_name("loss.png")
    plot_metrics(options.metrics, picture, title=options.title)
    _print(str(picture))


def _tail(options: argparse.Namespace) -> None:
    if options.lines < 0:
        raise LoggingError(f"--lines={options.lines}: give how many records to print, 0 or more")
    printer = _Printer()
    last: deque[str] = deque(maxlen=options.lines)
    try:
        file = options.metrics.open("rb")
    except OSError as error:
        raise LoggingError(
            f"{options.metrics}: cannot be read ({error.strerror});"
            " give a file that the jsonl sink wrote"
        ) from error
    with file:
        for stamped in _records(file):
            last.extend(printer.lines(stamped))
        for line in last:
            _print(line)
        while options.follow and not printer.ended:
            time.sleep(_POLL_S)
            for stamped in _records(file):
                for line in printer.lines(stamped):
                    _print(line)


def _records(file: BinaryIO) -> Iterator[Stamped]:
    """Yield the records from where *file* stands to its end, and leave it after the last."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):  # still being written, or torn and soon cut off
            file.seek(start)
            return
        try:
            yield decode_stamped(line.decode())
        except ValueError:
            continue  # not a record, such as what a later version writes


class _Printer:
    """Turns records into lines."""

    def __init__(self) -> None:
        self.ended = False
        self._progress = Progress()
        self._device = ""

    def lines(self, stamped: Stamped) -> list[str]:
        """Return what to print for a record: one line, or none."""
        event = stamped.event
        self.ended = isinstance(event, RunEnd)
        text = self._text(event)
        when = time.strftime("%m-%d %H:%M:%S  ", time.localtime(stamped.time))
        return [] if text is None else [when + text]

    def _text(self, event: RunInfo | StepEvent | EvalEvent | SaveEvent | RunEnd) -> str | None:
        if isinstance(event, RunInfo):
            self._progress.total, self._device = event.total_steps, event.device
            return wording.run_line(event)
        if isinstance(event, StepEvent):
            return aligned(event, self._progress, device=self._device)
        if isinstance(event, EvalEvent):
            return f"step {event.step:>6}  {wording.eval_line(event)}"
        if isinstance(event, SaveEvent):
            text = wording.save_line(event)
            return None if text is None else f"step {event.step:>6}  {text}"
        return wording.end_line(event)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
