# SPDX-License-Identifier: Apache-2.0
"""The command ``mb-train data build``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from mb_engine.data.indexed_build import BuildReport

_EVERY = 0.5  # seconds between two lines of progress


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the subcommand to *commands*.

    Args:
        commands: What ``argparse`` returns from ``add_subparsers``.
        shared: Arguments that all commands on a configuration have.
    """
    parser = commands.add_parser("data", help="prepare data for training")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        parents=[shared],
        help="tokenize JSONL, Parquet and text into indexed files (dataset.type=indexed)",
    )
    build.add_argument(
        "--input", action="append", required=True, metavar="FILE", help="file or pattern; repeat it"
    )
    build.add_argument("--output", type=Path, required=True, metavar="PREFIX")
    build.add_argument("--text-key", default="text", help="field of a record; default: text")
    build.add_argument("--workers", type=int, default=0, metavar="N", help="default: one a core")
    build.add_argument(
        "--no-eod", action="store_true", help="leave out the token that ends a document"
    )
    build.add_argument(
        "--on-error", choices=("error", "skip"), default="error", help="of a broken record"
    )
    build.set_defaults(command=_build)


def _build(arguments: argparse.Namespace) -> int:
    from mb_engine.cli import load_config
    from mb_engine.data.errors import DataError
    from mb_engine.data.indexed_build import BuildOptions, build_indexed_files

    if arguments.workers < 0:
        raise DataError(f"--workers={arguments.workers}: must be 0 or more; leave it out")
    config = load_config(arguments.config, arguments.overrides)
    options = BuildOptions(
        inputs=tuple(arguments.input),
        output=arguments.output,
        tokenizer=config.tokenizer,
        text_key=arguments.text_key,
        workers=arguments.workers,
        append_eod=not arguments.no_eod,
        skip_bad=arguments.on_error == "skip",
    )
    report = build_indexed_files(options, progress=_Bar())
    print(_in_words(report, options.output))  # noqa: T201
    return 0


class _Bar:
    """Shows progress on the terminal; nothing where standard error is none."""

    def __init__(self) -> None:
        self.begun, self.shown = time.monotonic(), 0.0

    def __call__(self, done: int, total: int, tokens: int) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self.shown < _EVERY and done < total):
            return
        self.shown = now
        share = done / max(1, total)
        rate = tokens / max(now - self.begun, 1e-9)
        bar = "#" * int(30 * share)
        end = "\n" if done >= total else ""
        text = f"\r[{bar:<30}] {100 * share:5.1f}%  {tokens:,} tokens  {rate:,.0f} tokens/s "
        print(text, end=end, file=sys.stderr, flush=True)  # noqa: T201


def _in_words(report: BuildReport, output: Path) -> str:
    reused = f" ({report.blocks_reused} done before)" if report.blocks_reused else ""
    lines = [
        f"{output}.bin, {output}.idx",
        f"  documents  {report.documents:,}",
        f"  tokens     {report.tokens:,}",
        f"  empty      {report.empty:,}",
        f"  left out   {report.bad:,}",
        f"  input      {report.input_bytes:,} bytes in {report.blocks} blocks{reused}",
        *(f"  {example}" for example in report.examples),
    ]
    return "\n".join(lines)
