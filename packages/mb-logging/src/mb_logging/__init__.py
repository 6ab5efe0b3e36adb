# SPDX-License-Identifier: Apache-2.0
"""Metrics, sinks, timers, throughput and plots for training runs."""

from mb_logging.__about__ import __version__
from mb_logging.encoding import read_events
from mb_logging.errors import LoggingError
from mb_logging.interfaces import MetricSink
from mb_logging.plots import plot_events, plot_metrics
from mb_logging.recorder import Recorder
from mb_logging.sinks.console import Console
from mb_logging.sinks.jsonl import JSONL
from mb_logging.sinks.plot import Plot
from mb_logging.sinks.tensorboard import TensorBoard
from mb_logging.throughput import ThroughputWindow, model_flops_utilization
from mb_logging.timers import Timers

__all__ = [
    "JSONL",
    "Console",
    "LoggingError",
    "MetricSink",
    "Plot",
    "Recorder",
    "TensorBoard",
    "ThroughputWindow",
    "Timers",
    "__version__",
    "model_flops_utilization",
    "plot_events",
    "plot_metrics",
    "read_events",
]
