# SPDX-License-Identifier: Apache-2.0
"""The command ``mb-train convert``: between Hugging Face folders and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands: Any) -> None:
    """Add ``convert`` to the subcommands of a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "convert", help="convert between Hugging Face folders and checkpoints"
    )
    parser.add_argument(
        "what",
        choices=("import", "export", "config"),
        help="a folder into step 0 of a checkpoint; a checkpoint into a folder; or print the"
        " configuration of a folder",
    )
    parser.add_argument("source", help="folder, or checkpoint to export")
    parser.add_argument("target", nargs="?", help="checkpoint, or folder to export to")
    parser.add_argument("--step", type=int, default=None, help="export: default: the newest")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=None,
        help="export: of a model that was trained from scratch; default: that of its parameters",
    )
    parser.add_argument(
        "--family", default=None, help="export: of such a model; default: the one that fits"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from mb_engine.errors import EngineError

    wants_target = arguments.what != "config"
    if wants_target != (arguments.target is not None):
        does = "needs a target" if wants_target else "takes no target"
        raise EngineError(f"convert {arguments.what}: {does}; see mb-train convert --help")
    only_export = [name for name in ("step", "dtype", "family") if _given(arguments, name)]
    if only_export and arguments.what != "export":
        raise EngineError(
            f"--{only_export[0]}: is for convert export, not for {arguments.what}; leave it out"
        )
    {"import": _import, "export": _export, "config": _config}[arguments.what](arguments)
    return 0


def _given(arguments: argparse.Namespace, name: str) -> bool:
    return getattr(arguments, name) is not None


def _import(arguments: argparse.Namespace) -> None:
    from mb_engine.bridge import import_hf

    config = import_hf(arguments.source, arguments.target)
    print(f"{arguments.target}: step 0, {config.model.num_layers} layers")  # noqa: T201


def _export(arguments: argparse.Namespace) -> None:
    import torch

    from mb_engine.bridge import export_hf

    export_hf(
        arguments.source,
        arguments.target,
        step=arguments.step,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        family=arguments.family,
    )
    print(f"{arguments.target}: written")  # noqa: T201


def _config(arguments: argparse.Namespace) -> None:
    from mb_engine.bridge import config_from_hf

    print(config_from_hf(arguments.source).to_yaml())  # noqa: T201
