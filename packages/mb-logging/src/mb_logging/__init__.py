# SPDX-License-Identifier: Apache-2.0
"""Metrics, sinks, timers, throughput and plots for training runs."""

from mb_logging.__about__ import __version__
from mb_logging.encoding import read_events
from mb_logging.errors import LoggingError
from mb_logging.interfaces import MetricSink, SpanClock
from mb_logging.log import LogContext, configure_logging
from mb_logging.plots import plot_events, plot_metrics
from mb_logging.recorder import Recorder
from mb_logging.sinks.console import Console
from mb_logging.sinks.jsonl import JSONL
from mb_logging.sinks.plot import Plot
from mb_logging.sinks.tensorboard import TensorBoard
from mb_logging.summary import Summary, summarize
from mb_logging.throughput import (
    Throughput,
    ThroughputWindow,
    model_flops_utilization,
    peak_tflops,
)
from mb_logging.timers import Span, Timers, as_metrics, over_ranks

__all__ = [
    "JSONL",
    "Console",
    "LogContext",
    "LoggingError",
    "MetricSink",
    "Plot",
    "Recorder",
    "Span",
    "SpanClock",
    "Summary",
    "TensorBoard",
    "Throughput",
    "ThroughputWindow",
    "Timers",
    "__version__",
    "as_metrics",
    "configure_logging",
    "model_flops_utilization",
    "over_ranks",
    "peak_tflops",
    "plot_events",
    "plot_metrics",
    "read_events",
    "summarize",
]
