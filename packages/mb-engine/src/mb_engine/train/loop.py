# SPDX-License-Identifier: Apache-2.0
"""The training loop, written on the engine's public methods alone."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs import define, field

from mb_engine.bridge import export_model
from mb_engine.errors import NumericsError
from mb_engine.train.evaluate import eval_event
from mb_engine.train.exits import ExitConditions, finished
from mb_engine.train.housekeeping import Housekeeping
from mb_engine.train.meter import StepMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mb_config.records import Event, LossTerms, StepEvent
    from torch import Tensor

    from mb_engine.train.batch_size import BatchSizeSchedule
    from mb_engine.train.engine import Engine
    from mb_engine.train.outcome import OptimizerStep
    from mb_engine.train.saving import BackgroundSaver

    Batch = Mapping[str, Tensor]


@define(kw_only=True, eq=False)
class TrainLoop:
    """Runs steps until an exit condition holds; evaluates, saves and reports on the way.

    Attributes:
        engine: What is trained.
        batches: Endless micro-batches of this data-parallel rank, from the engine's data position.
        batch_sizes: How many micro-batches a step takes.
        validation: ``name -> function`` that returns an evaluation's steps.
        emit: Takes records; does nothing on ranks that do not report.
        saver: Saves checkpoints, None for none.
        flops_per_token: For the reported throughput.
    """

    engine: Engine
    batches: Iterator[Batch]
    batch_sizes: BatchSizeSchedule
    validation: Mapping[str, Callable[[], Iterable[Sequence[Batch]]]] = field(factory=dict)
    emit: Callable[[Event], None]
    saver: BackgroundSaver | None = None
    flops_per_token: float = 0.0
    _meter: StepMeter = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._meter = StepMeter(
            flops_per_token=self.flops_per_token, world_size=self.engine.layout.world_size
        )

    def run(self) -> str:
        """Train; return why it ended.

        Raises:
            NumericsError: If the loss or the gradient norm is not finite.
        """
        engine, config = self.engine, self.engine.config
        reason = finished(config, engine.progress)
        with (
            ExitConditions(config=config, layout=engine.layout) as exits,
            Housekeeping(config=config, engine=engine) as housekeeping,
        ):
            while reason is None:
                housekeeping.before_step(engine.progress.step)
                exits.begin()
                self._step()
                step = engine.progress.step
                reason = finished(config, engine.progress) or exits.reason(engine.progress)
                if len(self._meter) and (reason or step % config.logger.log_interval == 0):
                    self._report()
                if self._due(step) and reason is None:
                    with housekeeping.around_evaluation():
                        self.evaluate()
                housekeeping.after_step(step)
                self._save_if_due(step, ending=reason is not None)
        return reason

    def _step(self) -> None:
        engine = self.engine
        batches = self._next_batches()
        if engine.progress.step + 1 in engine.config.train.iterations_to_skip:
            engine.skip_step(batches)
            return
        consumed = engine.progress.consumed_tokens
        terms = engine.forward_backward(batches)
        if self.saver is not None:
            self.saver.fence()
        outcome = engine.optimizer_step()
        self._check(terms, outcome)
        self._meter.add(terms, outcome, tokens=engine.progress.consumed_tokens - consumed)

    def _next_batches(self) -> list[Batch]:
        count = self.batch_sizes.num_microbatches(self.engine.progress.consumed_samples)
        return [next(self.batches) for _ in range(count)]

    def _check(self, terms: LossTerms, outcome: OptimizerStep) -> None:
        """Refuse to go on after a step that spoiled the weights.

        The gradient norm is on the host already, so this makes nobody wait; the loss is looked at
        when it is reported.
        """
        del terms
        if not self.engine.config.train.check_for_nan_in_loss or outcome.grad_norm is None:
            return
        if outcome.updated and not math.isfinite(outcome.grad_norm):
            self._refuse("gradient norm", outcome.grad_norm)

    def _refuse(self, what: str, value: float) -> None:
        step = self.engine.progress.step
        raise NumericsError(
            f"the {what} is {value} at step {step}; lower optimizer.lr, look at the data of this"
            " step, or name it in train.iterations_to_skip and resume from the last checkpoint"
        )

    def _report(self) -> StepEvent:
        engine = self.engine
        size = self.batch_sizes.global_batch_size(engine.progress.consumed_samples)
        event = self._meter.event(engine.progress, global_batch_size=size)
        logger_config = engine.config.logger
        if logger_config.log_params_norm:
            norm = engine.parameters_norm()
            event = attrs.evolve(event, metrics={**event.metrics, "params_norm": norm})
        if not logger_config.log_throughput:
            event = attrs.evolve(event, tokens_per_second=0.0, tflops_per_device=0.0)
        self.emit(event)
        if engine.config.train.check_for_nan_in_loss and not math.isfinite(event.loss):
            self._refuse("loss", event.loss)
        return event

    def _due(self, step: int) -> bool:
        validation = self.engine.config.validation
        interval = validation.eval_interval
        start = validation.start_eval_at_iter or 0
        return bool(self.validation and interval and step % interval == 0 and step >= start)

    def evaluate(self) -> dict[str, Any]:
        """Evaluate every validation set, report each, and return the records by name."""
        results = {}
        for name, steps in self.validation.items():
            begun = time.perf_counter()
            terms = self.engine.evaluate(steps())
            seconds = time.perf_counter() - begun
            event = eval_event(terms, step=self.engine.progress.step, name=name, seconds=seconds)
            self.emit(event)
            self._meter.exclude(time.perf_counter() - begun)
            results[name] = event
        return results

    def _export(self, step: int) -> None:
        folder = self.engine.config.checkpoint.save_hf
        if folder is not None:
            export_model(self.engine, Path(folder) / f"step_{step:08d}")

    def _save_if_due(self, step: int, *, ending: bool) -> None:
        if self.saver is None or self.saver.last_step == step:
            return
        interval = self.engine.config.checkpoint.save_interval
        if ending or (interval and step % interval == 0):
            begun = time.perf_counter()
            self.saver.save(step, self.engine.state())
            self._export(step)
            self._meter.exclude(time.perf_counter() - begun)
