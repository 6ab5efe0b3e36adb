# SPDX-License-Identifier: Apache-2.0
"""The composition root: turns names in a configuration into objects, through entry points.

This is the one place that knows which package fills which role. In Python one passes the objects
instead.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import field, frozen
from mb_config import plugins
from mb_config.errors import PluginError

if TYPE_CHECKING:
    from mb_config import ConfigContainer
    from mb_config.records import Event, ProcessLayout

    from mb_engine.interfaces import Callback, Checkpointer, ModelTransform

logger = logging.getLogger(__name__)


@frozen(kw_only=True)
class Components:
    """What a run is composed of besides the engine.

    Attributes:
        checkpointer: Saves and loads; None where nothing is saved or loaded.
        initial: Where the starting weights come from, if not from *checkpointer*'s own steps.
        transforms: Changes to the model, in order.
        callbacks: Get every record, on global rank 0.
    """

    checkpointer: Checkpointer | None = None
    initial: Checkpointer | None = None
    transforms: tuple[ModelTransform, ...] = ()
    callbacks: tuple[Callback, ...] = field(default=())


def load_plugin(group: str, name: str, *, setting: str, extra: str) -> Any:
    """Return the plugin *name*, or say which package to install.

    Raises:
        PluginError: Naming the setting that asked for it.
    """
    try:
        return plugins.load(group, name)
    except PluginError as error:
        if name in plugins.names(group):
            raise
        raise PluginError(
            f"{setting} is set but nothing provides {name!r} in {group!r};"
            f' pip install "mb-engine[{extra}]"'
        ) from error


def transforms_of(config: ConfigContainer) -> tuple[ModelTransform, ...]:
    """Return the model changes that ``config.peft`` asks for.

    Raises:
        PluginError: If the package that does it is not installed.
    """
    if config.peft is None:
        return ()
    make = load_plugin(
        "mb.model_transforms", type(config.peft).__name__.lower(), setting="peft", extra="peft"
    )
    return (make(config.peft),)


def checkpointers_of(
    config: ConfigContainer, layout: ProcessLayout
) -> tuple[Checkpointer | None, Checkpointer | None]:
    """Return the run's own checkpointer, and where the starting weights come from.

    Call it once process groups exist.

    Raises:
        PluginError: If the package that does it is not installed.
    """
    checkpoint = config.checkpoint
    from_hub = hub_folder_of(config) is not None
    initial_weights = checkpoint.pretrained_checkpoint and not from_hub
    if not (checkpoint.save or checkpoint.load or initial_weights):
        return None, None
    setting = f"checkpoint.backend={checkpoint.backend!r}"
    make = load_plugin("mb.checkpointers", checkpoint.backend, setting=setting, extra="ckpt")
    own = make(checkpoint, layout) if checkpoint.save or checkpoint.load else None
    initial = None
    if initial_weights:
        only_load = attrs.evolve(
            checkpoint, save=None, save_interval=None, load=checkpoint.pretrained_checkpoint
        )
        initial = make(only_load, layout)
    return own, initial


def hub_folder_of(config: ConfigContainer) -> Path | None:
    """Return ``checkpoint.pretrained_checkpoint`` if it is a Hugging Face folder, else None.

    Raises:
        EngineError: If ``checkpoint.load`` is one: a run cannot be resumed from it.
    """
    from mb_engine.bridge.source import is_hub_folder
    from mb_engine.errors import EngineError

    load, initial = config.checkpoint.load, config.checkpoint.pretrained_checkpoint
    if load and is_hub_folder(Path(load)):
        raise EngineError(
            f"checkpoint.load={load}: is a Hugging Face folder, from which no run can be resumed;"
            " give it as checkpoint.pretrained_checkpoint"
        )
    return Path(initial) if initial and is_hub_folder(Path(initial)) else None


def callbacks_of(config: ConfigContainer) -> tuple[Callback, ...]:
    """Return the reporting callbacks; plain log lines where mb-logging is not installed.

    Raises:
        PluginError: If sinks are named but the package that has them is not installed.
    """
    if "recorder" in plugins.names("mb.callbacks"):
        return (plugins.load("mb.callbacks", "recorder")(config),)
    if config.logger.sinks:
        raise PluginError(
            f"logger.sinks={config.logger.sinks} is set but mb-logging is not installed;"
            ' pip install "mb-engine[logging]"'
        )
    return (LogLines(),)


class LogLines:
    """Reports every record as one line of the standard library's logging."""

    def on_event(self, event: Event) -> None:
        """Log *event*."""
        shown = attrs.asdict(event, filter=lambda a, _: a.repr and a.name != "config")
        text = " ".join(f"{k}={v}" for k, v in shown.items() if v not in (None, "", {}, 0))
        logger.info("%s %s", type(event).__name__, text)

    def close(self) -> None:
        """Nothing to close."""
