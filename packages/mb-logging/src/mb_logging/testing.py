# SPDX-License-Identifier: Apache-2.0
"""For tests: a sink that remembers, and what every sink must do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent

from mb_logging.interfaces import MetricSink

if TYPE_CHECKING:
    from collections.abc import Callable

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
        RunInfo(run_name="sample", total_steps=2, num_parameters=1_234_567),
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
    """Check that a sink takes every kind of record, none at all, and is closed once.

    Args:
        make: Returns a new sink.

    Raises:
        AssertionError: If it is not a sink; errors of the sink itself come through.
    """
    idle = make()
    assert isinstance(idle, MetricSink), f"{type(idle).__name__} lacks write(event) or close()"
    idle.close()
    sink = make()
    for event in sample_events():
        sink.write(event)
    sink.close()
