# SPDX-License-Identifier: Apache-2.0
"""What the entry points name: the recorder and the built-in sinks, from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mb_config import plugins
from mb_config.errors import ConfigError, Violation

from mb_logging.guard import GuardedSink
from mb_logging.recorder import Recorder
from mb_logging.sinks.console import Console
from mb_logging.sinks.jsonl import JSONL
from mb_logging.sinks.plot import Plot
from mb_logging.sinks.tensorboard import TensorBoard

if TYPE_CHECKING:
    from mb_config import ConfigContainer

    from mb_logging.interfaces import MetricSink

GROUP = "mb.metric_sinks"
METRICS = "metrics.jsonl"
PICTURE = "loss.png"


def make_recorder(config: ConfigContainer) -> Recorder:
    """Return a recorder with the sinks that ``logger.sinks`` names; the console if that is None.

    A name that stands there twice is one sink.

    Raises:
        UserError: If a sink is unknown, lacks a package, or needs ``logger.log_dir``.
    """
    names = config.logger.sinks if config.logger.sinks is not None else ["console"]
    sinks: list[MetricSink] = []
    try:
        for name in dict.fromkeys(names):
            sinks.append(plugins.load(GROUP, name)(config))  # noqa: PERF401 - close those made
    except BaseException:
        for sink in sinks:
            GuardedSink(sink=sink).close()
        raise
    return Recorder(*sinks)


def make_console(config: ConfigContainer) -> Console:
    """Return the sink for people; it prints every report, for ``logger.log_interval`` spaces them."""
    return Console(config.train.train_iters, interval_s=0.0)


def make_jsonl(config: ConfigContainer) -> JSONL:
    """Return the sink that writes ``metrics.jsonl`` in ``logger.log_dir``."""
    return JSONL(_folder(config, "jsonl") / METRICS)


def make_tensorboard(config: ConfigContainer) -> TensorBoard:
    """Return the sink for TensorBoard, in ``logger.tensorboard_dir`` or below ``logger.log_dir``."""
    folder = config.logger.tensorboard_dir
    return TensorBoard(folder or _folder(config, "tensorboard") / "tensorboard")


def make_plot(config: ConfigContainer) -> Plot:
    """Return the sink that draws ``loss.png`` in ``logger.log_dir``."""
    folder = _folder(config, "plot")
    return Plot(folder / PICTURE, history=folder / METRICS)


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
