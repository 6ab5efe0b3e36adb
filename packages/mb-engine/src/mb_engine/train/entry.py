# SPDX-License-Identifier: Apache-2.0
"""Whole jobs in one call: pretrain, finetune, generate."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from attrs import frozen
from mb_config.errors import ConfigError, Violation
from mb_config.records import RunEnd

from mb_engine import compose
from mb_engine.bridge import load_hf
from mb_engine.errors import EngineError
from mb_engine.train.loop import TrainLoop
from mb_engine.train.resolve import with_epochs, with_vocabulary
from mb_engine.train.run_info import run_info
from mb_engine.train.saving import BackgroundSaver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mb_config import ConfigContainer
    from mb_config.records import EvalEvent, Event

    from mb_engine.compose import Components
    from mb_engine.data.datasets import Datasets
    from mb_engine.data.tokenizers import Tokenizer
    from mb_engine.interfaces import Callback, Checkpointer, ForwardStep, Objective
    from mb_engine.train.engine import Engine
    from mb_engine.train.state import TrainState

logger = logging.getLogger(__name__)


@frozen(kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        reason: Why, in words.
        state: The counters at its end.
        evaluations: The last evaluation by name.
        failed_saves: Checkpoints that could not be saved.
        exit_code: What a process should return.
    """

    reason: str
    state: TrainState
    evaluations: dict[str, EvalEvent]
    failed_saves: int = 0
    exit_code: int = 0


def pretrain(
    config: ConfigContainer,
    *,
    datasets: Datasets | None = None,
    tokenizer: Tokenizer | None = None,
    objective: Objective | None = None,
    forward_step: ForwardStep | None = None,
    callbacks: Sequence[Callback] = (),
    components: Components | None = None,
) -> RunResult:
    """Train as *config* says, on all ranks that a launcher started, or on this one alone.

    Resumes from ``checkpoint.load`` where that is set and holds a checkpoint; starts from the
    weights of ``checkpoint.pretrained_checkpoint`` where that is set.

    Args:
        config: Resolved or not.
        datasets: In place of the ones ``config.dataset`` describes.
        tokenizer: In place of the one ``config.tokenizer`` describes.
        objective: In place of next-token cross-entropy.
        forward_step: In place of the usual call of the model.
        callbacks: Get every record on global rank 0, besides those of the configuration.
        components: In place of everything that entry points would provide.

    Raises:
        UserError: What the user can put right, in one line.
    """
    job = _Job(config, datasets=datasets, tokenizer=tokenizer)
    transforms = compose.transforms_of(config) if components is None else components.transforms
    engine = job.build(objective=objective, forward_step=forward_step, transforms=transforms)
    try:
        return job.run(engine, callbacks=callbacks, components=components)
    finally:
        engine.close()


def finetune(config: ConfigContainer, **arguments: Any) -> RunResult:
    """Train from existing weights; takes the arguments of :func:`pretrain`.

    Raises:
        ConfigError: If the configuration names no weights to start from.
    """
    if not (config.checkpoint.pretrained_checkpoint or config.checkpoint.load):
        rule = Violation(
            field="checkpoint.pretrained_checkpoint",
            value="None",
            rule="fine-tuning starts from existing weights",
            remedy="name a checkpoint here, or one to resume in checkpoint.load",
        )
        raise ConfigError.from_violations([rule])
    return pretrain(config, **arguments)


class _Job:
    """The parts of one run, put together in the order that their dependencies ask for."""

    def __init__(
        self,
        config: ConfigContainer,
        *,
        datasets: Datasets | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        from mb_engine.data.datasets import build_datasets
        from mb_engine.data.loader import sample_order
        from mb_engine.data.tokenizers import build_tokenizer
        from mb_engine.runtime.distributed import world_size_from_environment

        self.begun = time.monotonic()
        self.tokenizer = tokenizer or build_tokenizer(config.tokenizer)
        config = with_vocabulary(config, self.tokenizer)
        config = config.finalize(world_size_from_environment())
        self.datasets = datasets or build_datasets(config, self.tokenizer)
        order = sample_order(config, len(self.datasets.train))
        self.config = with_epochs(config, num_samples=order.epoch_size)
        self.evaluations: dict[str, EvalEvent] = {}

    def build(self, **parts: Any) -> Engine:
        from mb_engine.train.engine import Engine

        engine = Engine.from_config(self.config, **parts)
        self.config = engine.config
        return engine

    def run(
        self, engine: Engine, *, callbacks: Sequence[Callback], components: Components | None
    ) -> RunResult:
        parts = components or self._components(engine)
        self._load(engine, parts)
        reporting = engine.layout.rank == 0
        listeners = (*parts.callbacks, *callbacks) if reporting else ()
        emit = partial(_emit, listeners, self.evaluations)
        emit(run_info(engine))
        reason, failed = "", 0
        try:
            loop = self._loop(engine, parts, emit)
            if self.config.validation.skip_train:
                reason = "validation.skip_train is set"
            else:
                reason = loop.run()
            if self.config.validation.eval_at_end or self.config.validation.skip_train:
                loop.evaluate()
            if loop.saver is not None:
                loop.saver.finish()
                failed = loop.saver.failures
        except BaseException as error:
            reason = reason or f"{type(error).__name__}: {error}"
            self._end(emit, listeners, engine, reason, exit_code=1)
            raise
        if components is None:
            _close(parts.checkpointer, parts.initial)
        self._end(emit, listeners, engine, reason, exit_code=0)
        return RunResult(
            reason=reason,
            state=engine.progress,
            evaluations=self.evaluations,
            failed_saves=failed,
        )

    def _end(
        self,
        emit: Callable[[Event], None],
        listeners: Iterable[Callback],
        engine: Engine,
        reason: str,
        *,
        exit_code: int,
    ) -> None:
        seconds = time.monotonic() - self.begun
        emit(RunEnd(step=engine.progress.step, reason=reason, seconds=seconds, exit_code=exit_code))
        for listener in listeners:
            close = getattr(listener, "close", None)
            if close is not None:
                close()

    def _components(self, engine: Engine) -> Components:
        own, initial = compose.checkpointers_of(self.config, engine.layout)
        callbacks = compose.callbacks_of(self.config) if engine.layout.rank == 0 else ()
        return compose.Components(checkpointer=own, initial=initial, callbacks=callbacks)

    def _load(self, engine: Engine, parts: Components) -> None:
        """Resume the run, or take its starting weights, or start from scratch."""
        checkpoint = self.config.checkpoint
        where = f"checkpoint.load={checkpoint.load}"
        if checkpoint.load and parts.checkpointer is not None:
            if parts.checkpointer.steps():
                engine.load(
                    parts.checkpointer,
                    checkpoint.ckpt_step,
                    where=where,
                    weights_only=checkpoint.finetune,
                )
                return
            # A run that resumes from its own folder finds nothing there the first time; any other
            # empty folder is a mistake.
            own = checkpoint.load == checkpoint.save or checkpoint.pretrained_checkpoint
            if checkpoint.exit_on_missing_checkpoint or not own:
                raise EngineError(
                    f"{where} holds no complete checkpoint; name a folder that has one, or leave"
                    " checkpoint.load out to start from scratch"
                )
        folder = compose.hub_folder_of(self.config)
        if folder is not None and parts.initial is None:
            load_hf(engine, folder)
        elif parts.initial is not None:
            where = f"checkpoint.pretrained_checkpoint={checkpoint.pretrained_checkpoint}"
            if not parts.initial.steps():
                raise EngineError(f"{where} holds no complete checkpoint; name a folder that has")
            engine.load(parts.initial, where=where, weights_only=True)

    def _loop(self, engine: Engine, parts: Components, emit: Callable[[Event], None]) -> TrainLoop:
        from mb_engine.data.loader import batches, evaluation_steps
        from mb_engine.model.flops import flops_per_token
        from mb_engine.train.batch_size import BatchSizeSchedule

        config, layout = self.config, engine.layout
        sizes = BatchSizeSchedule.from_config(config)
        training = batches(
            self.datasets.train,
            config=config,
            layout=layout,
            consumed_samples=engine.progress.consumed_samples,
            global_batch_size=sizes.global_batch_size,
        )
        validation = {
            name: partial(evaluation_steps, dataset, config=config, layout=layout)
            for name, dataset in self.datasets.valid.items()
            if config.validation.eval_iters or config.validation.full_validation
        }
        saver = None
        if config.checkpoint.save and parts.checkpointer is not None:
            saver = BackgroundSaver(
                checkpointer=parts.checkpointer,
                path=config.checkpoint.save,
                emit=emit,
                blocking=not config.checkpoint.async_save,
                refuse=config.checkpoint.async_queue == "refuse",
            )
        # Samples packed or padded into a row attend to less than a whole row.
        lengths = getattr(self.datasets.train, "sample_lengths", lambda: None)()
        return TrainLoop(
            engine=engine,
            batches=training,
            batch_sizes=sizes,
            validation=validation,
            emit=emit,
            saver=saver,
            flops_per_token=flops_per_token(config, lengths),
        )


def _close(*checkpointers: Checkpointer | None) -> None:
    """Let other jobs save where these did, and give their threads and memory back."""
    for checkpointer in checkpointers:
        close = getattr(checkpointer, "close", None)
        if close is not None:
            close()


def _emit(listeners: Sequence[Callback], evaluations: dict[str, EvalEvent], event: Event) -> None:
    from mb_config.records import EvalEvent as Evaluation

    if isinstance(event, Evaluation):
        evaluations[event.name] = event
    for listener in listeners:
        listener.on_event(event)


def generate_text(
    config: ConfigContainer, prompt: str, *, max_new_tokens: int = 200, **sampling: Any
) -> str:
    """Return *prompt* continued by the checkpoint that ``checkpoint.load`` names.

    Raises:
        UserError: If there is no such checkpoint, or it holds another model.
    """
    job = _Job(config)
    engine = job.build()
    try:
        parts = compose.Components(
            checkpointer=compose.checkpointers_of(job.config, engine.layout)[0]
        )
        if parts.checkpointer is None or not parts.checkpointer.steps():
            raise EngineError(
                f"checkpoint.load={config.checkpoint.load} holds no complete checkpoint; name a"
                " folder that has one"
            )
        engine.load(
            parts.checkpointer,
            config.checkpoint.ckpt_step,
            where=f"checkpoint.load={config.checkpoint.load}",
            weights_only=True,
        )
        ids = engine.generate(job.tokenizer.encode(prompt), max_new_tokens, **sampling)
        return job.tokenizer.decode(ids)
    finally:
        engine.close()
