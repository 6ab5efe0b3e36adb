# SPDX-License-Identifier: Apache-2.0
"""The command ``mb-train``: run, generate, and look at configurations."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mb_config import ConfigContainer
from mb_config.errors import UserError

from mb_engine import convert_command, data_command
from mb_engine.plan import command as plan_command
from mb_engine.recipes import command as recipes_command

if TYPE_CHECKING:
    from collections.abc import Sequence

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after printing one line about what the user must change."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except UserError as error:
        if arguments.debug:
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")


def _fail(message: str) -> int:
    from mb_engine.launch import report_failure

    if not report_failure(message):
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mb-train",
        description="Train language models with megatron-core, on CPU or CUDA.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", type=Path, help="YAML, JSON or TOML file; defaults if left out")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION.FIELD=VALUE",
        help="e.g. train.train_iters=50; ~SECTION unsets a section",
    )
    launched = argparse.ArgumentParser(add_help=False)
    launched.add_argument(
        "--nproc",
        type=int,
        default=None,
        help="ranks on this machine; default: the GPUs, or on a CPU what the config needs",
    )
    run = commands.add_parser("run", parents=[shared, launched], help="train as the config says")
    recipes_command.add_argument(run)
    run.set_defaults(command=_run)
    text = commands.add_parser(
        "generate", parents=[shared, launched], help="continue a prompt from a checkpoint"
    )
    text.add_argument("--prompt", required=True)
    text.add_argument("--max-new-tokens", type=int, default=200)
    text.add_argument("--temperature", type=float, default=0.8)
    text.add_argument("--top-k", type=int, default=50)
    text.add_argument("--seed", type=int, default=0)
    text.set_defaults(command=_generate)
    show = commands.add_parser("config", parents=[shared], help="check and print the configuration")
    show.add_argument("--world-size", type=int, default=None, help="resolve it for so many ranks")
    show.add_argument("--explain", metavar="FIELD", help="say where a value comes from")
    show.add_argument("--schema", action="store_true", help="print the JSON Schema for editors")
    recipes_command.add_argument(show)
    show.set_defaults(command=_config)
    plan_command.add_parser(commands, shared)
    convert_command.add_parser(commands)
    recipes_command.add_parser(commands)
    data_command.add_parser(commands, shared)
    return parser


def load_config(path: Path | None, overrides: Sequence[str]) -> ConfigContainer:
    """Return the configuration of *path* with *overrides* applied.

    Raises:
        ConfigError: If the file or an override cannot be used; names it.
    """
    readers = {
        ".json": ConfigContainer.from_json,
        ".toml": ConfigContainer.from_toml,
    }
    if path is None:
        config = ConfigContainer()
    else:
        config = readers.get(path.suffix, ConfigContainer.from_yaml)(path)
    return config.override(*overrides) if overrides else config


def _run(arguments: argparse.Namespace) -> int:
    from mb_engine import launch

    config = recipes_command.configuration(arguments)
    if not launch.is_worker():
        nproc = launch.choose_nproc(config, arguments.nproc)
        launch.check_before_launch(config, nproc)
        if nproc > 1:
            flags = [f"--recipe={arguments.recipe}"] if arguments.recipe else []
            argv = _worker_argv("run", arguments, flags)
            return launch.launch(nproc, argv, debug=arguments.debug)
    _log_to_stderr(config)
    from mb_engine.train.entry import pretrain

    return pretrain(config).exit_code


def _generate(arguments: argparse.Namespace) -> int:
    from mb_engine import launch

    config = load_config(arguments.config, arguments.overrides)
    if not launch.is_worker():
        nproc = launch.choose_nproc(config, arguments.nproc)
        launch.check_before_launch(config, nproc)
        if nproc > 1:
            flags = [
                f"--prompt={arguments.prompt}",
                f"--max-new-tokens={arguments.max_new_tokens}",
                f"--temperature={arguments.temperature}",
                f"--top-k={arguments.top_k}",
                f"--seed={arguments.seed}",
            ]
            argv = _worker_argv("generate", arguments, flags)
            return launch.launch(nproc, argv, debug=arguments.debug)
    _log_to_stderr(config)
    from mb_engine.train.entry import generate_text

    text = generate_text(
        config,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    if os.environ.get("RANK", "0") == "0":
        print(text)  # noqa: T201
    return 0


def _worker_argv(
    command: str, arguments: argparse.Namespace, flags: Sequence[str] = ()
) -> list[str]:
    argv = [command, *flags]
    if arguments.config is not None:
        argv.append(f"--config={arguments.config}")
    if arguments.debug:
        argv.append("--debug")
    return [*argv, *arguments.overrides]


def _config(arguments: argparse.Namespace) -> int:
    import json

    if arguments.schema:
        from mb_config import json_schema

        print(json.dumps(json_schema(), indent=2))  # noqa: T201
        return 0
    config = recipes_command.configuration(arguments)
    if arguments.world_size is not None:
        config = config.finalize(arguments.world_size)
    print(config.explain(arguments.explain) if arguments.explain else config.to_yaml())  # noqa: T201
    return 0


def _log_to_stderr(config: ConfigContainer) -> None:
    """Log this toolkit's own messages as configured; of other packages what is worth a warning."""
    rank = int(os.environ.get("RANK", "0"))
    level = logging.getLevelNamesMapping()[config.logger.logging_level]
    quiet = max(level, logging.WARNING) if level > logging.DEBUG else level
    logging.basicConfig(level=quiet, format=f"[rank {rank}] %(levelname)s %(name)s: %(message)s")
    for package in ("mb_engine", "mb_ckpt", "mb_peft", "mb_distill", "mb_logging"):
        logging.getLogger(package).setLevel(level if rank == 0 else quiet)
    if level > logging.DEBUG:
        # Its warnings are about how it is written, not about what the user does.
        warnings.filterwarnings("ignore", module=r"megatron\.")


if __name__ == "__main__":
    code = main()
    if code and "RANK" in os.environ:
        # A failed rank leaves at once: others may wait for it in a collective, and the launcher
        # ends them only when this process is gone.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
