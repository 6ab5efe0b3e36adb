# SPDX-License-Identifier: Apache-2.0
"""Turns the numbers of a loop of one's own into records."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, SupportsFloat, SupportsInt

from attrs import define, field
from mb_config.records import EvalEvent, RunEnd, StepEvent

from mb_logging.throughput import ThroughputWindow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@define(kw_only=True, eq=False)
class OwnLoop:
    """Counts and times steps.

    Attributes:
        flops_per_token: Model FLOPs of forward and backward of one token; 0 where unknown.
        num_devices: Devices that share the work.
        clock: Seconds of any clock that does not go back.
        steps: Steps recorded.
    """

    flops_per_token: float = 0.0
    num_devices: int = 1
    clock: Callable[[], float] = time.perf_counter
    steps: int = field(default=0, init=False)
    _last_step: int = field(default=0, init=False)
    _samples: int = field(default=0, init=False)
    _tokens: int = field(default=0, init=False)
    _window: ThroughputWindow = field(init=False)
    _began: float = field(init=False)
    _last: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._began = self._last = self.clock()
        self._window = ThroughputWindow(
            flops_per_token=self.flops_per_token, num_devices=self.num_devices
        )
        self._window.add(0, now=self._began)

    def step(
        self,
        step: int,
        *,
        loss: SupportsFloat,
        tokens: SupportsInt,
        samples: SupportsInt,
        lr: SupportsFloat,
        grad_norm: SupportsFloat | None,
        metrics: Mapping[str, SupportsFloat],
    ) -> StepEvent:
        """Return the record of one step; its time is the time since the last one."""
        now = self.clock()
        seconds, self._last = now - self._last, now
        self.steps += 1
        self._last_step = step
        self._tokens += int(tokens)
        self._samples += int(samples)
        self._window.add(int(tokens), now=now)
        rate = self._window.throughput()
        return StepEvent(
            step=step,
            consumed_samples=self._samples,
            consumed_tokens=self._tokens,
            loss=float(loss),
            learning_rate=float(lr),
            grad_norm=None if grad_norm is None else float(grad_norm),
            global_batch_size=int(samples),
            seconds=seconds,
            tokens_per_second=rate.tokens_per_second if rate else 0.0,
            tflops_per_device=rate.tflops_per_device if rate else 0.0,
            metrics={name: float(value) for name, value in metrics.items()},
        )

    def evaluation(
        self,
        step: int,
        *,
        loss: SupportsFloat,
        name: str,
        tokens: SupportsInt,
        metrics: Mapping[str, SupportsFloat],
    ) -> EvalEvent:
        """Return the record of one evaluation; its time, since the last record, is in no step's."""
        now = self.clock()
        seconds, self._last = now - self._last, now
        self._window.exclude(seconds)
        return EvalEvent(
            step=step,
            name=name,
            loss=float(loss),
            perplexity=math.exp(min(20.0, float(loss))),
            num_tokens=int(tokens),
            seconds=seconds,
            metrics={name: float(value) for name, value in metrics.items()},
        )

    def end(self, error: BaseException | None) -> RunEnd:
        """Return the last record."""
        return RunEnd(
            step=self._last_step,
            reason="the loop ended" if error is None else type(error).__name__,
            seconds=self.clock() - self._began,
            exit_code=0 if error is None else 1,
        )
