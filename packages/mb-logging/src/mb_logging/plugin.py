# SPDX-License-Identifier: Apache-2.0
"""What the entry points name: the recorder and the built-in sinks, from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mb_config import plugins
from mb_config.errors import ConfigError, Violation

from mb_logging.recorder import Recorder
from mb_logging.sinks.console import Console
from mb_logging.sinks.jsonl import JSONL

if TYPE_CHECKING:
    from mb_config import ConfigContainer

    from mb_logging.interfaces import MetricSink
    from mb_logging.sinks.plot import Plot
    from mb_logging.sinks.tensorboard import TensorBoard

METRICS = "metrics.jsonl"
_SINKS = "mb.metric_sinks"


def make_recorder(config: ConfigContainer) -> Recorder:
    """Return a recorder with the sinks that ``logger.sinks`` names; the console if it names none.

    Raises:
        UserError: If a sink is unknown, lacks a package, or needs ``logger.log_dir``.
    """
    names = config.logger.sinks if config.logger.sinks is not None else ["console"]
    return Recorder(*(_sink(name, config) for name in names))


def _sink(name: str, config: ConfigContainer) -> MetricSink:
    sink: MetricSink = plugins.load(_SINKS, name)(config)
    return sink


def make_console(config: ConfigContainer) -> Console:
    """Return the sink for people."""
    return Console(config.train.train_iters)


def make_jsonl(config: ConfigContainer) -> JSONL:
    """Return the sink that writes ``metrics.jsonl`` in ``logger.log_dir``."""
    return JSONL(_folder(config, "jsonl") / METRICS)


def make_tensorboard(config: ConfigContainer) -> TensorBoard:
    """Return the sink for TensorBoard, in ``logger.tensorboard_dir`` or below the log folder."""
    from mb_logging.sinks.tensorboard import TensorBoard

    folder = config.logger.tensorboard_dir
    return TensorBoard(folder or _folder(config, "tensorboard") / "tensorboard")


def make_plot(config: ConfigContainer) -> Plot:
    """Return the sink that draws ``loss.png`` in ``logger.log_dir``."""
    from mb_logging.sinks.plot import Plot

    folder = _folder(config, "plot")
    return Plot(folder / "loss.png", history=folder / METRICS)


def _folder(config: ConfigContainer, sink: str) -> Path:
    if config.logger.log_dir is None:
        rule = Violation(
            field="logger.log_dir",
            value="None",
            rule=f"the {sink} sink of logger.sinks={config.logger.sinks} needs a folder",
            remedy="set logger.log_dir, or leave the sink out",
        )
        raise ConfigError.from_violations([rule])
    return Path(config.logger.log_dir)
