# SPDX-License-Identifier: Apache-2.0
"""TensorBoard event files, written by the ``tensorboard`` package alone: no torch, no tensorflow."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from mb_config.records import EvalEvent, RunInfo, SaveEvent, StepEvent

from mb_logging.errors import LoggingError, make_folder, require
from mb_logging.throughput import model_flops_utilization

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from mb_config.records import Event

_FLUSH_S = 5.0


class TensorBoard:
    """Writes scalars under ``train/``, ``eval/<data set>/`` and ``checkpoint/``, and the run as text.

    A resumed run writes a file of its own beside the earlier ones, and tells TensorBoard to leave
    out what those have beyond the step that it goes on from.

    Args:
        folder: Where the event file goes.

    Raises:
        LoggingError: If tensorboard is not installed, or the file cannot be opened.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        # The package's EventFileWriter would import tensorflow where it happens to be installed,
        # and start a thread; the recorder has one.
        records = _import("summary.writer.record_writer")
        self._summary = _import("compat.proto.summary_pb2")
        self._event = _import("compat.proto.event_pb2")
        self._tensor = _import("compat.proto.tensor_pb2")
        self._types = _import("compat.proto.types_pb2")
        self.path = make_folder(folder, sink="tensorboard") / _file_name()
        try:
            self._file = self.path.open("xb")
        except OSError as error:
            raise LoggingError(
                f"{self.path}: the tensorboard sink cannot open this file ({error.strerror});"
                " give a folder that can be written"
            ) from error
        self._writer = records.RecordWriter(self._file)
        self._device = ""
        self._flushed = 0.0
        self._add(file_version="brain.Event:2")

    def write(self, event: Event) -> None:
        """Write the numbers of *event*."""
        if isinstance(event, StepEvent):
            self._scalars("train/", event.step, self._step_scalars(event))
        elif isinstance(event, EvalEvent):
            scalars = {"loss": event.loss, "perplexity": event.perplexity, **event.metrics}
            self._scalars(f"eval/{event.name}/", event.step, scalars)
        elif isinstance(event, SaveEvent) and event.status == "saved":
            self._scalars("checkpoint/", event.step, {"seconds": event.seconds})
        elif isinstance(event, RunInfo):
            self._run(event)
        if not isinstance(event, StepEvent) or time.monotonic() - self._flushed > _FLUSH_S:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def _run(self, event: RunInfo) -> None:
        self._device = event.device
        started = self._event.SessionLog(status=self._event.SessionLog.START)
        self._add(step=event.start_step + 1, session_log=started)
        facts = {
            "run": event.run_name,
            "parameters": f"{event.num_parameters:,}",
            "layout": event.layout,
            "device": f"{event.world_size} x {event.device}",
            **event.versions,
        }
        rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
        self._text("run", event.start_step, f"| | |\n|-|-|\n{rows}")
        config = json.dumps(event.config, indent=2, default=str).replace("\n", "\n    ")
        self._text("config", event.start_step, f"    {config}")

    def _scalars(self, prefix: str, step: int, scalars: Mapping[str, float]) -> None:
        values = [
            self._summary.Summary.Value(tag=prefix + name, simple_value=float(value))
            for name, value in scalars.items()
        ]
        self._add(step=step, summary=self._summary.Summary(value=values))

    def _text(self, tag: str, step: int, markdown: str) -> None:
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        value = self._summary.Summary.Value(
            tag=tag,
            metadata=self._summary.SummaryMetadata(plugin_data=plugin),
            tensor=self._tensor.TensorProto(
                dtype=self._types.DT_STRING, string_val=[markdown.encode()]
            ),
        )
        self._add(step=step, summary=self._summary.Summary(value=[value]))

    def _add(self, **fields: Any) -> None:
        event = self._event.Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())

    def _step_scalars(self, event: StepEvent) -> dict[str, float]:
        scalars: dict[str, float | None] = {
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "weight_decay": event.weight_decay,
            "grad_norm": event.grad_norm,
            "loss_scale": event.loss_scale,
            "global_batch_size": event.global_batch_size,
            "consumed_samples": event.consumed_samples,
            "consumed_tokens": event.consumed_tokens,
            "skipped_steps": event.skipped_steps,
            "seconds": event.seconds,
            "tokens_per_second": event.tokens_per_second,
            "tflops_per_device": event.tflops_per_device,
            "mfu": model_flops_utilization(event.tflops_per_device, self._device),
            **event.metrics,
        }
        return {name: value for name, value in scalars.items() if value is not None}


def _import(module: str) -> Any:
    return require(f"tensorboard.{module}", extra="tensorboard", sink="tensorboard")


def _file_name() -> str:
    """Return a name that no other writer has, and that sorts after those of earlier runs.

    TensorBoard reads the files of a folder in the order of their names.
    """
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    when = f"{seconds:010d}.{nanoseconds:09d}"
    return f"events.out.tfevents.{when}.{socket.gethostname()}.{os.getpid()}"
