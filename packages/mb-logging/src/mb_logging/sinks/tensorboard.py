# SPDX-License-Identifier: Apache-2.0
"""TensorBoard event files, written by the ``tensorboard`` package alone: no torch, no tensorflow."""

from __future__ import annotations

import time
from os import fspath
from typing import TYPE_CHECKING

from mb_config.records import EvalEvent, RunInfo, StepEvent

from mb_logging.errors import require

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from mb_config.records import Event


class TensorBoard:
    """Writes scalars under ``train/`` and ``eval/<data set>/``.

    Args:
        folder: Where the event file goes.

    Raises:
        LoggingError: If tensorboard is not installed.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        writer = require(
            "tensorboard.summary.writer.event_file_writer", extra="tensorboard", sink="tensorboard"
        )
        self._summary = require(
            "tensorboard.compat.proto.summary_pb2", extra="tensorboard", sink="tensorboard"
        )
        self._event = require(
            "tensorboard.compat.proto.event_pb2", extra="tensorboard", sink="tensorboard"
        )
        self._writer = writer.EventFileWriter(fspath(folder))

    def write(self, event: Event) -> None:
        """Write the numbers of *event*; records without numbers are passed over."""
        if isinstance(event, StepEvent):
            self._scalars("train/", event.step, _step_scalars(event))
        elif isinstance(event, EvalEvent):
            scalars = {"loss": event.loss, "perplexity": event.perplexity, **event.metrics}
            self._scalars(f"eval/{event.name}/", event.step, scalars)
            self._writer.flush()
        elif isinstance(event, RunInfo):
            self._scalars("run/", event.start_step, {"world_size": float(event.world_size)})

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _scalars(self, prefix: str, step: int, scalars: Mapping[str, float]) -> None:
        values = [
            self._summary.Summary.Value(tag=prefix + name, simple_value=value)
            for name, value in scalars.items()
        ]
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))


def _step_scalars(event: StepEvent) -> dict[str, float]:
    scalars: dict[str, float | None] = {
        "loss": event.loss,
        "learning_rate": event.learning_rate,
        "weight_decay": event.weight_decay,
        "grad_norm": event.grad_norm,
        "loss_scale": event.loss_scale,
        "global_batch_size": float(event.global_batch_size),
        "skipped_steps": float(event.skipped_steps),
        "seconds": event.seconds,
        "tokens_per_second": event.tokens_per_second,
        "tflops_per_device": event.tflops_per_device,
        **event.metrics,
    }
    return {name: value for name, value in scalars.items() if value is not None}
