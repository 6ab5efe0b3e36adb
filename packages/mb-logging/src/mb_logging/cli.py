# SPDX-License-Identifier: Apache-2.0
"""The command ``mb-log``: look at a metrics file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mb_config.errors import UserError

from mb_logging.encoding import read_events
from mb_logging.errors import LoggingError
from mb_logging.plots import plot_metrics
from mb_logging.sinks.console import Console

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after printing one line about what is wrong."""
    parser = argparse.ArgumentParser(prog="mb-log", description="Look at a run's metrics.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    plot = commands.add_parser("plot", help="draw loss and learning rate")
    plot.add_argument("metrics", type=Path)
    plot.add_argument("picture", type=Path)
    show = commands.add_parser("show", help="print the records as the console would")
    show.add_argument("metrics", type=Path)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "plot":
            plot_metrics(arguments.metrics, arguments.picture)
        else:
            _show(arguments.metrics)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _show(path: Path) -> None:
    if not path.is_file():
        raise LoggingError(f"{path}: no such metrics file; give one that the jsonl sink wrote")
    console = Console()
    for event in read_events(path):
        console.write(event)
    console.close()
