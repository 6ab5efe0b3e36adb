# SPDX-License-Identifier: Apache-2.0
"""Means over a logging interval, kept on the device until the interval ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from attrs import define, field
from mb_config.records import StepEvent

if TYPE_CHECKING:
    from mb_config.records import LossTerms

    from mb_engine.train.outcome import OptimizerStep
    from mb_engine.train.state import TrainState


@define(kw_only=True, eq=False)
class StepMeter:
    """Collects steps and turns them into one :class:`StepEvent`.

    Attributes:
        flops_per_token: Model FLOPs of forward and backward of one token.
        world_size: Devices that share the work.
    """

    flops_per_token: float
    world_size: int
    _terms: list[LossTerms] = field(factory=list, init=False)
    _outcomes: list[OptimizerStep] = field(factory=list, init=False)
    _tokens: int = field(default=0, init=False)
    _since: float = field(factory=time.perf_counter, init=False)
    _paused: float = field(default=0.0, init=False)

    def add(self, terms: LossTerms, outcome: OptimizerStep, *, tokens: int) -> None:
        """Count one step; reads nothing from the device."""
        self._terms.append(terms)
        self._outcomes.append(outcome)
        self._tokens += tokens

    def exclude(self, seconds: float) -> None:
        """Leave *seconds* of other work, such as an evaluation, out of the interval's time."""
        self._paused += seconds

    def __len__(self) -> int:
        """Return how many steps were counted since the last event."""
        return len(self._terms)

    def event(self, progress: TrainState, *, global_batch_size: int) -> StepEvent:
        """Return the interval's record and begin the next one; waits for the device.

        Losses are averaged over the steps whose update was done; all of them where none was.
        """
        used = [t for t, o in zip(self._terms, self._outcomes, strict=True) if o.updated]
        used = used or self._terms
        loss = sum(float(t.loss) for t in used) / len(used)
        names = used[-1].metrics
        metrics = {
            name: sum(float(t.metrics[name][0] / t.metrics[name][1]) for t in used) / len(used)
            for name in names
        }
        last = self._outcomes[-1]
        if last.num_zeros is not None:
            metrics["num_zeros_in_grad"] = float(last.num_zeros)
        # After the losses were read, so that the device's work is in the time.
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        rate = self._tokens / seconds
        event = StepEvent(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_tokens,
            loss=loss,
            learning_rate=last.learning_rate,
            weight_decay=last.weight_decay,
            grad_norm=last.grad_norm,
            loss_scale=last.loss_scale if last.loss_scale != 1.0 else None,
            global_batch_size=global_batch_size,
            skipped_steps=sum(not o.updated for o in self._outcomes),
            seconds=seconds / len(self._terms),
            tokens_per_second=rate,
            tflops_per_device=rate * self.flops_per_token / self.world_size / 1e12,
            metrics=metrics,
        )
        progress.seconds += seconds
        self._terms, self._outcomes, self._tokens = [], [], 0
        self._since, self._paused = time.perf_counter(), 0.0
        return event
