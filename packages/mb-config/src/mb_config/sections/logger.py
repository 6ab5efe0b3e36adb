# SPDX-License-Identifier: Apache-2.0
"""What to report and where."""

from __future__ import annotations

from typing import Literal

from attrs import define

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class LoggerConfig:
    """What a run reports.

    Attributes:
        log_interval: Steps between reports.
        sinks: Names in the entry-point group mb.metric_sinks; null means console where mb-logging
            is installed, plain log lines otherwise.
        log_dir: Folder for metrics.jsonl, plots, traces and TensorBoard events.
        tensorboard_dir: Folder for TensorBoard events; null means log_dir/tensorboard.
        run_name: Name for people.
        log_params_norm: Report the L2 norm of the parameters.
        log_throughput: Report tokens/s and TFLOP/s.
        logging_level: Level of Python's log.
    """

    log_interval: int = number(10, ge=1)
    sinks: list[str] | None = None
    log_dir: str | None = None
    tensorboard_dir: str | None = None
    run_name: str = "run"
    log_params_norm: bool = False
    log_throughput: bool = True
    logging_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    __attrs_post_init__ = check_all
    __repr__ = concise
