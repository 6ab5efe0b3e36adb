# SPDX-License-Identifier: Apache-2.0
"""The command ``mb-train plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

_SUFFIXES = (".yaml", ".yml", ".json", ".toml")


def add_parser(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the subcommand to *commands*.

    Args:
        commands: What ``argparse`` returns from ``add_subparsers``.
        shared: Arguments that all commands on a configuration have.
    """
    parser = commands.add_parser(
        "plan",
        parents=[shared],
        help="say what a run will need: memory, communication, FLOPs; or search a layout",
    )
    parser.add_argument(
        "--world-size", "--gpus", type=int, required=True, metavar="N", help="ranks of the job"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="e.g. h100-80gb: say whether it fits, count CUDA's tensors"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, FLOPs, seconds")
    parser.add_argument(
        "--search", action="store_true", help="propose layouts that fit, fastest first"
    )
    parser.add_argument("--keep", type=int, default=10, metavar="K", help="layouts to print")
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mb_engine.cli import load_config
    from mb_engine.errors import EngineError
    from mb_engine.plan import report
    from mb_engine.plan.ranks import plan
    from mb_engine.plan.search import search

    path, overrides = arguments.config, list(arguments.overrides)
    if path is None and overrides and overrides[0].endswith(_SUFFIXES) and "=" not in overrides[0]:
        path = Path(overrides.pop(0))
    config = load_config(path, overrides)
    if not arguments.search:
        made = plan(config, world_size=arguments.world_size, gpu=arguments.gpu)
        _print(report.as_data(made) if arguments.json else report.as_text(made))
        return 0
    if arguments.gpu is None:
        raise EngineError("--gpu: --search needs to know which GPU; give --gpu h100-80gb")
    if arguments.keep < 1:
        raise EngineError(f"--keep={arguments.keep}: must be at least 1; leave it out for 10")
    found = search(config, gpus=arguments.world_size, gpu=arguments.gpu, keep=arguments.keep)
    texts = report.candidates_as_data if arguments.json else report.candidates_as_text
    _print(texts(found))
    return 0


def _print(shown: Any) -> None:
    import json

    print(shown if isinstance(shown, str) else json.dumps(shown, indent=2))  # noqa: T201
