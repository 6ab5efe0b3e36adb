# SPDX-License-Identifier: Apache-2.0
"""When a run ends, agreed on by all ranks without making the device wait."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any, Self

import torch
from attrs import define, field

if TYPE_CHECKING:
    from types import FrameType

    from mb_config import ConfigContainer
    from mb_config.records import ProcessLayout

    from mb_engine.train.state import TrainState

_GO_ON, _OUT_OF_TIME, _SIGNALLED = 0, 1, 2


@define(kw_only=True, eq=False)
class ExitConditions:
    """Decides after every step whether to go on; a context manager that owns the signal handler.

    What only one rank may know (a signal, the clock) is shared by a small all-reduce on the CPU that
    runs behind the step: ``begin`` starts it and ``reason`` collects it.

    Attributes:
        config: The resolved configuration.
        layout: This rank's place.
        started: ``time.monotonic()`` when the run began.
    """

    config: ConfigContainer
    layout: ProcessLayout
    started: float = field(factory=time.monotonic)
    _signal: int | None = field(default=None, init=False)
    _previous: Any = field(default=None, init=False)
    _group: Any = field(default=None, init=False)
    _flags: torch.Tensor = field(init=False, factory=lambda: torch.zeros(1, dtype=torch.int32))
    _work: Any = field(default=None, init=False)

    def __enter__(self) -> Self:
        """Install the signal handler and make the group that shares the flags."""
        train = self.config.train
        if train.exit_signal_handler:
            number = signal.Signals[train.exit_signal]
            self._previous = (number, signal.signal(number, self._on_signal))
        if self.layout.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        return self

    def __exit__(self, *exc: object) -> None:
        """Give the signal back to whoever had it."""
        if self._previous is not None:
            signal.signal(*self._previous)
            self._previous = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number

    def begin(self) -> None:
        """Start sharing what this rank knows; call before the step's work."""
        limit = self.config.train.exit_duration_in_mins
        late = limit is not None and time.monotonic() - self.started > 60 * limit
        flag = _SIGNALLED if self._signal is not None else _OUT_OF_TIME if late else _GO_ON
        self._flags.fill_(flag)
        if self._group is not None:
            self._work = torch.distributed.all_reduce(
                self._flags, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
            )

    def reason(self, progress: TrainState) -> str | None:
        """Return why the run should end now, the same on every rank, or None."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        train = self.config.train
        shared = int(self._flags)
        if shared == _SIGNALLED:
            return f"{train.exit_signal} received"
        if shared == _OUT_OF_TIME:
            return f"exit_duration_in_mins={train.exit_duration_in_mins} reached"
        if train.exit_interval and progress.step % train.exit_interval == 0:
            return f"exit_interval={train.exit_interval} reached"
        return None


def finished(config: ConfigContainer, progress: TrainState) -> str | None:
    """Return which duration *progress* has reached, or None."""
    train = config.train
    reached = (
        ("train_samples", train.train_samples, progress.consumed_samples),
        ("train_tokens", train.train_tokens, progress.consumed_tokens),
        ("train_iters", train.train_iters, progress.step),
    )
    for name, limit, value in reached:
        if limit is not None and value >= limit:
            return f"{name}={limit} reached"
    return None
