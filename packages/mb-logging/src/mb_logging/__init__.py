# SPDX-License-Identifier: Apache-2.0
"""Metrics, sinks, timers, throughput and plots for training runs."""

from mb_logging.__about__ import __version__

__all__ = ["__version__"]
