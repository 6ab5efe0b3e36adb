# SPDX-License-Identifier: Apache-2.0
"""For tests: a sink that remembers, and what every sink must do."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import attrs
from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent

from mb_logging.interfaces import MetricSink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mb_config.records import Event


class MemorySink:
    """Keeps every record in ``events``."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = False

    def write(self, event: Event) -> None:
        """Keep *event*."""
        self.events.append(event)

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def sample_events() -> list[Event]:
    """Return one run's records, of every kind, with numbers that are hard to print."""
    return [
        RunInfo(
            run_name="sample",
            total_steps=2,
            num_parameters=1_234_567,
            config={"model": {"num_layers": 2, "window_size": None}, "sinks": ["console"]},
        ),
        StepEvent(
            step=1,
            consumed_samples=8,
            consumed_tokens=256,
            loss=float("inf"),
            learning_rate=1e-4,
            skipped_steps=1,
            loss_scale=65536.0,
        ),
        StepEvent(
            step=2,
            consumed_samples=16,
            consumed_tokens=512,
            loss=5.5,
            learning_rate=2e-4,
            grad_norm=float("nan"),
            seconds=0.5,
            tokens_per_second=1e6,
            tflops_per_device=0.01,
            metrics={"accuracy": 0.25},
        ),
        EvalEvent(step=2, name="validation", loss=5.4, perplexity=221.4, num_tokens=64),
        SaveEvent(step=2, path="checkpoints", status="started", seconds=0.01),
        SaveEvent(step=2, path="checkpoints", status="failed", error="no space left on device"),
        SaveEvent(step=2, path="checkpoints", status="saved", seconds=1.0),
        RunEnd(step=2, reason="train_iters=2 reached", seconds=3.0),
    ]


def check_sink(make: Callable[[], MetricSink]) -> None:
    """Check that a sink does what the recorder asks of it.

    It must take every kind of record, none at all, steps without a run, and a run that begins
    again at an earlier step; and it must work on another thread than the one that made it, and
    leave the records as they are.

    Args:
        make: Returns a new sink.

    Raises:
        AssertionError: If it is not a sink; errors of the sink itself come through.
    """
    idle = make()
    assert isinstance(idle, MetricSink), f"{type(idle).__name__} lacks write(event) or close()"
    idle.close()
    run = sample_events()
    again = RunInfo(run_name="sample", total_steps=2, start_step=1)
    for events in (run, run[1:3], [*run, again, *run[2:]]):
        before = [attrs.asdict(event) for event in events]
        _write_all(make(), events)
        after = [attrs.asdict(event) for event in events]
        assert repr(before) == repr(after), "the sink changed a record that others will get"


def _write_all(sink: MetricSink, events: Sequence[Event]) -> None:
    """Write on another thread, as the recorder does, and raise what the sink raises."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for event in events:
                sink.write(event)
            sink.close()
        except BaseException as error:  # noqa: BLE001 - raised below, on the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
