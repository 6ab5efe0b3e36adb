# SPDX-License-Identifier: Apache-2.0
"""The command ``mb-train recipes``, and ``--recipe`` of other commands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from mb_config import ConfigContainer

    from mb_engine.plan import Plan

_GIB = 1 << 30
_BILLION = 1e9


def add_parser(commands: Any) -> None:
    """Add ``recipes`` to the subcommands of a parser.

    Args:
        commands: What ``ArgumentParser.add_subparsers`` returned.
    """
    parser = commands.add_parser("recipes", help="list recipes, or print one")
    parser.add_argument("name", nargs="?", help="print the configuration of this one")
    parser.add_argument("--gpus", type=int, default=None, help="for so many H100s")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=_recipes)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--recipe`` to a command on a configuration."""
    parser.add_argument("--recipe", metavar="NAME", help="in place of --config; see recipes")


def configuration(arguments: argparse.Namespace) -> ConfigContainer:
    """Return the configuration that ``--config`` or ``--recipe`` and the overrides say.

    Raises:
        UserError: If both are given, or one cannot be used.
    """
    from mb_engine.cli import load_config
    from mb_engine.errors import EngineError

    if arguments.recipe is None:
        return load_config(arguments.config, arguments.overrides)
    if arguments.config is not None:
        raise EngineError(
            f"--recipe={arguments.recipe}: cannot go with --config={arguments.config}; give one of"
            " them, and overrides"
        )
    from mb_engine.recipes.catalogue import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides, gpus=_gpus(arguments))


def _gpus(arguments: argparse.Namespace) -> int | None:
    """Return how many ranks the job has, as far as that is known before it starts."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    asked: int | None = getattr(arguments, "nproc", None) or getattr(arguments, "world_size", None)
    if asked is not None:
        return asked
    import torch

    return torch.cuda.device_count() or None


def _recipes(arguments: argparse.Namespace) -> int:
    if arguments.name is not None:
        from mb_engine.recipes.catalogue import recipe

        print(recipe(arguments.name, gpus=arguments.gpus).to_yaml())  # noqa: T201
        return 0
    for line in _listing(arguments.gpus):
        print(line)  # noqa: T201
    return 0


def _listing(gpus: int | None) -> list[str]:
    from mb_engine.recipes.catalogue import recipes

    lines = [f"{'recipe':26} {'parameters':>10}  GPUs (memory of each, h100-80gb)"]
    for one in recipes():
        counts = [count for count in one.gpus if gpus is None or count == gpus]
        if counts:
            texts = ", ".join(f"{count} ({memory(one.name, count):.0f} GiB)" for count in counts)
            lines.append(f"{one.name:26} {one.parameters / _BILLION:9.1f}B  {texts}")
    return lines


def memory(name: str, gpus: int) -> float:
    """Return GiB of the fullest GPU of a recipe, as the planner estimates them."""
    return planned(name, gpus).peak_bytes / _GIB


def planned(name: str, gpus: int) -> Plan:
    """Return the planner's plan of a recipe.

    What a recipe leaves to be set changes no size; data is made up.
    """
    from mb_engine.plan import plan
    from mb_engine.recipes.catalogue import GPU, recipe

    config = recipe(name, gpus=gpus).override("dataset.type=mock")
    config.tokenizer.tokenizer_model = "made up"
    return plan(config, world_size=gpus, gpu=GPU)
