# SPDX-License-Identifier: Apache-2.0
"""The command ``mb-train convert``: between Hugging Face folders and checkpoints."""

from __future__ import annotations

import argparse
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands: Any) -> None:
    """Add ``convert`` to the subcommands of a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "convert", help="convert between Hugging Face folders and checkpoints"
    )
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")

    bring = kinds.add_parser("import", parents=[debug], help="a folder into step 0 of a checkpoint")
    bring.add_argument("folder", help="with config.json and safetensors files")
    bring.add_argument("save", help="folder or URL of the checkpoint")
    bring.set_defaults(command=_import)

    take = kinds.add_parser("export", parents=[debug], help="a checkpoint into a folder")
    take.add_argument("checkpoint", help="folder or URL")
    take.add_argument("folder", help="made if it is not there")
    take.add_argument("--step", type=int, default=None, help="default: the newest")
    take.add_argument(
        "--dtype", choices=DTYPES, default=None, help="of a model that was trained from scratch"
    )
    take.add_argument("--family", default=None, help="of such a model; default: the one that fits")
    take.set_defaults(command=_export)

    show = kinds.add_parser("config", parents=[debug], help="print the configuration of a folder")
    show.add_argument("folder", help="with config.json")
    show.set_defaults(command=_config)


def _import(arguments: argparse.Namespace) -> int:
    from mb_engine.bridge import import_hf

    config = import_hf(arguments.folder, arguments.save)
    print(f"{arguments.save}: step 0, {config.model.num_layers} layers")  # noqa: T201
    return 0


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from mb_engine.bridge import export_hf

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    export_hf(
        arguments.checkpoint,
        arguments.folder,
        step=arguments.step,
        dtype=dtype,
        family=arguments.family,
    )
    print(f"{arguments.folder}: written")  # noqa: T201
    return 0


def _config(arguments: argparse.Namespace) -> int:
    from mb_engine.bridge import config_from_hf

    print(config_from_hf(arguments.folder).to_yaml())  # noqa: T201
    return 0
