# SPDX-License-Identifier: Apache-2.0
"""The training engine: a model on this rank, its optimizer, and the few verbs a loop needs."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from attrs import define, field

from mb_engine.bridge.source import HubSource, shards_to_fill, source_of, with_source
from mb_engine.errors import CheckpointMismatchError, EngineError
from mb_engine.parallel import optimizer_state, shards
from mb_engine.parallel.wrap import connect_schedule, unwrapped, wrap_data_parallel
from mb_engine.precision import quantized
from mb_engine.precision.support import check_precision
from mb_engine.train import state as train_state
from mb_engine.train.objective import LanguageModelObjective
from mb_engine.train.outcome import OptimizerStep
from mb_engine.train.state import TrainState
from mb_engine.train.step import MicroBatchRunner, counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mb_config import ConfigContainer
    from mb_config.records import LossTerms, ProcessLayout, TensorShard
    from torch import Tensor, nn

    from mb_engine.interfaces import (
        Checkpointer,
        ForwardStep,
        ModelTransform,
        Objective,
        SaveHandle,
    )

logger = logging.getLogger(__name__)


@define(kw_only=True, eq=False)
class Engine:
    """Drives one model over all ranks of a job; every method is called on all ranks together.

    ``pretrain`` is written on this class alone. A loop of one's own needs::

        engine = Engine.from_config(config)
        terms = engine.forward_backward(batches)
        engine.optimizer_step()

    Attributes:
        config: The resolved configuration.
        layout: This rank's place and groups.
        chunks: Model chunks of this rank, wrapped for data parallelism.
        optimizer: Megatron-core's optimizer.
        scheduler: Sets learning rate and weight decay.
        progress: Counters; ``optimizer_step`` advances them.
        hub: What is kept of the Hugging Face folder that the weights began in, if any.
    """

    config: ConfigContainer
    layout: ProcessLayout
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    runner: MicroBatchRunner
    progress: TrainState = field(factory=TrainState)
    hub: HubSource | None = field(default=None, init=False)
    _samples: int = field(default=0, init=False)
    _tokens: int = field(default=0, init=False)
    _hooks_on: bool = field(default=False, init=False)
    _unstaged: SaveHandle | None = field(default=None, init=False)

    @classmethod
    def from_config(
        cls,
        config: ConfigContainer,
        *,
        objective: Objective | None = None,
        forward_step: ForwardStep | None = None,
        transforms: Sequence[ModelTransform] = (),
    ) -> Engine:
        """Start the process groups and build model, optimizer and schedule on this rank.

        Args:
            config: Resolved or not; it is resolved for the world size that the launcher gives.
            objective: The loss; next-token cross-entropy if None.
            forward_step: How to call the model; the usual call if None.
            transforms: Changes to the model, in order.

        Raises:
            ConfigError: If the configuration does not fit this job.
            EngineError: If the job cannot start.
        """
        from mb_engine.runtime.distributed import initialize, world_size_from_environment
        from mb_engine.runtime.seeding import seed_everything

        resolved = config.finalize(world_size_from_environment())
        check_precision(resolved)
        layout = initialize(resolved)
        seed_everything(resolved.rng, layout)

        from mb_engine.model.gpt import build_model
        from mb_engine.parallel.overlap import initialize_overlap
        from mb_engine.train.optimizer import build_optimizer
        from mb_engine.train.schedule import build_scheduler

        initialize_overlap(resolved)
        model = build_model(resolved, layout)
        for transform in transforms:
            model = [_transformed(chunk, transform, layout) for chunk in model]
        chunks = wrap_data_parallel(resolved, model)
        optimizer = build_optimizer(resolved, chunks)
        connect_schedule(resolved, chunks, optimizer)
        runner = MicroBatchRunner(
            chunks=chunks,
            layout=layout,
            objective=objective or LanguageModelObjective(),
            forward_step=forward_step,
        )
        scheduler = build_scheduler(resolved, optimizer)
        engine = cls(
            config=resolved,
            layout=layout,
            chunks=chunks,
            optimizer=optimizer,
            scheduler=scheduler,
            runner=runner,
        )
        engine._start_hooks()
        return engine

    @property
    def model(self) -> list[nn.Module]:
        """The model chunks of this rank without their data-parallel wrappers."""
        return [unwrapped(chunk) for chunk in self.chunks]

    def model_shards(self) -> list[TensorShard]:
        """Return this rank's pieces of all parameters; with Megatron-FSDP, those it owns."""
        if self.config.ddp.use_megatron_fsdp:
            return [s for chunk in self.chunks for s in chunk.model_shards("model.")]
        return shards.model_shards(self.model)

    def forward_backward(self, batches: Sequence[Mapping[str, Tensor]]) -> LossTerms:
        """Compute the loss of one global batch and its gradients, replacing earlier gradients.

        Args:
            batches: This data-parallel rank's micro-batches; see :meth:`MicroBatchRunner.run`.

        Returns:
            The loss over the global batch, the same on every rank; device tensors, so that reading
            them is what waits for the device.
        """
        self.optimizer.zero_grad()
        for chunk in self.chunks:
            if not chunk.training:
                chunk.train()
            chunk.zero_grad_buffer()
        terms = self.runner.run(batches)
        self._samples, self._tokens = counted(batches, self.layout.dp)
        return terms

    def optimizer_step(self) -> OptimizerStep:
        """Clip the gradients, update the parameters and advance the schedule and the counters.

        Waits for a save begun with ``save`` to have copied what is about to change.
        """
        if self._unstaged is not None:
            self._unstaged.wait_staged()
            self._unstaged = None
        group = self.optimizer.param_groups[0] if self.optimizer.param_groups else {}
        loss_scale = self._loss_scale()
        lr, wd = float(group.get("lr", 0.0)), float(self.scheduler.weight_decay)
        updated, grad_norm, num_zeros = self.optimizer.step()
        if updated:
            self.scheduler.step(self._samples)
        self._advance(skipped=not updated)
        return OptimizerStep(
            updated=bool(updated),
            grad_norm=None if grad_norm is None else float(grad_norm),
            num_zeros=None if num_zeros is None else int(num_zeros),
            learning_rate=lr,
            weight_decay=wd,
            loss_scale=loss_scale,
        )

    def skip_step(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Count *batches* as consumed without training on them."""
        self._samples, self._tokens = counted(batches, self.layout.dp)
        self._advance(skipped=True)

    def evaluate(self, steps: Iterable[Sequence[Mapping[str, Tensor]]]) -> LossTerms:
        """Return the loss over *steps*, each a list of this rank's micro-batches, in eval mode.

        Raises:
            EngineError: If there is nothing to evaluate.
        """
        from mb_engine.train.evaluate import accumulate

        with self.synced_parameters(), self.eval_mode():
            return accumulate(self.runner.run(batches, forward_only=True) for batches in steps)

    def generate(self, tokens: Sequence[int], max_new_tokens: int, **sampling: Any) -> list[int]:
        """Continue *tokens*; see :func:`mb_engine.train.generate.generate`."""
        from mb_engine.train.generate import generate

        with self.synced_parameters(), self.eval_mode():
            return generate(self.runner, self.config, tokens, max_new_tokens, **sampling)

    def state(self) -> dict[str, Any]:
        """Return the state of the run, for ``Checkpointer.save``.

        Nothing in it changes before the next optimizer step: parameters and optimizer state are the
        live tensors, and what forward passes change (buffers, random states) is copied.
        """
        from mb_engine.runtime.seeding import rng_state

        checkpoint = self.config.checkpoint
        with self.synced_parameters(), quantized.plain_parameters(self.model):
            pieces = train_state.without_live_buffers(self.model_shards(), self.model)
            state: dict[str, Any] = {"model": pieces}
            state["run"] = train_state.plain_state(self.config, self.layout, self.progress)
            if checkpoint.save_optim:
                optimizer_state.allocate_state(self.optimizer)
                state["optimizer"] = self._optimizer_shards()
                state["run"]["optimizer"] = shards.optimizer_plain_state(self.optimizer)
                state["run"]["scheduler"] = self.scheduler.state_dict()
            state["run"]["has_rng"] = checkpoint.save_rng
            if checkpoint.save_rng:
                state["rng"] = train_state.rng_shards(rng_state(), rank=self.layout.rank)
        history = train_state.scaling_history(self.config, self.layout, self.model)
        state["run"]["scaling_history"] = sorted(history)
        state["fp8"] = list(history.values())
        return with_source(state, self.hub, rank=self.layout.rank)

    def save(self, checkpointer: Checkpointer) -> SaveHandle:
        """Begin to save the run as of the last step.

        The next ``optimizer_step`` waits until the save has its copy, so that a checkpointer may
        take it behind the forward and backward passes before.
        """
        self._unstaged = checkpointer.save(self.progress.step, self.state())
        return self._unstaged

    def load(
        self,
        checkpointer: Checkpointer,
        step: int | None = None,
        *,
        where: str = "the checkpoint",
        weights_only: bool = False,
    ) -> None:
        """Take over the state of *step*, whatever layout saved it.

        Args:
            checkpointer: Where from.
            step: Which step, None for the newest.
            where: The place in words, for messages.
            weights_only: Load the parameters alone, as a fine-tuning run does.

        Raises:
            CheckpointMismatchError: If it holds another model.
        """
        run = checkpointer.load({}, step).get("run")
        if run is None or "model_identity" not in run:
            raise CheckpointMismatchError(f"{where} was not saved by a training run of this engine")
        train_state.check_model_identity(self.config, run["model_identity"], where=where)
        with_optimizer = (
            not weights_only and self.config.checkpoint.load_optim and "optimizer" in run
        )
        with quantized.plain_parameters(self.model) as copies:
            wanted: dict[str, Any] = {"model": self.model_shards()}
            if with_optimizer:
                optimizer_state.allocate_state(self.optimizer)
                wanted["optimizer"] = self._optimizer_shards()
        history = train_state.scaling_history(self.config, self.layout, self.model, stored=run)
        wanted["fp8"] = list(history.values())
        random_states = self._wanted_rng(run, weights_only=weights_only)
        wanted["rng"] = train_state.rng_shards(random_states, rank=self.layout.rank)
        wanted["hub"] = shards_to_fill(run, rank=self.layout.rank)
        checkpointer.load(wanted, step)
        self.hub = source_of(wanted["hub"])
        quantized.quantize_again(copies)
        quantized.load_history(self.model, history)
        if with_optimizer:
            shards.load_optimizer_plain_state(self.optimizer, run["optimizer"])
            self.scheduler.load_state_dict(run["scheduler"])
        if self.config.ddp.use_megatron_fsdp:
            for chunk in self.chunks:
                chunk.take_over(main_params=with_optimizer)
        elif not with_optimizer:
            self.optimizer.reload_model_params()
        self._restore(run, random_states, weights_only=weights_only)

    def parameters_norm(self) -> float:
        """Return the L2 norm of the whole model's parameters."""
        from mb_engine.parallel.parameters import parameters_norm

        with self.synced_parameters():
            return parameters_norm(self.model_shards(), self.layout.device)

    def close(self) -> None:
        """Leave the process groups."""
        from mb_engine.runtime.distributed import shutdown

        shutdown()

    @contextmanager
    def synced_parameters(self) -> Iterator[None]:
        """Hold the overlapped parameter gather off while parameters are read."""
        if not self._hooks_on:
            yield
            return
        for chunk in self.chunks:
            chunk.disable_forward_pre_hook()
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.enable_forward_pre_hook()

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Switch dropout off and gradients away for a while."""
        training = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for chunk, was in zip(self.chunks, training, strict=True):
                chunk.train(was)

    def _optimizer_shards(self) -> list[TensorShard]:
        if self.config.ddp.use_megatron_fsdp:
            return [
                shard
                for chunk in self.chunks
                for shard in chunk.optimizer_shards(self.optimizer, "optimizer.")
            ]
        return shards.optimizer_shards(self.model, self.optimizer)

    def _start_hooks(self) -> None:
        ddp = self.config.ddp
        self._hooks_on = bool(
            ddp.use_distributed_optimizer
            and ddp.overlap_param_gather
            and not ddp.use_megatron_fsdp  # gathers what is read where it is read
        )

    def _loss_scale(self) -> float:
        if not self.config.model.fp16:
            return 1.0
        return float(self.optimizer.get_loss_scale())

    def _advance(self, *, skipped: bool) -> None:
        if not self._samples:
            raise EngineError("optimizer_step needs a forward_backward before it")
        self.progress.step += 1
        self.progress.consumed_samples += self._samples
        self.progress.consumed_tokens += self._tokens
        self.progress.skipped_steps += skipped
        self._samples = self._tokens = 0

    def _wanted_rng(self, run: Mapping[str, Any], *, weights_only: bool) -> dict[str, Tensor]:
        """Return this rank's random states to fill, or none where they belong to another layout."""
        from mb_engine.runtime.seeding import rng_state

        if weights_only or not self.config.checkpoint.load_rng or not run["has_rng"]:
            return {}
        if run["layout"] != train_state.layout_fingerprint(self.layout):
            logger.info("the checkpoint has another layout: random states start from the seed")
            return {}
        return rng_state()

    def _restore(
        self, run: Mapping[str, Any], random_states: Mapping[str, Tensor], *, weights_only: bool
    ) -> None:
        from mb_engine.runtime.seeding import seed_everything, set_rng_state

        if random_states:
            set_rng_state(random_states)
        if weights_only:
            return
        self.progress = TrainState(**run["progress"])
        if not random_states:
            # Another seed than at the start, so that dropout does not repeat its first masks.
            rng = self.config.rng
            seed_everything(attrs.evolve(rng, seed=rng.seed + self.progress.step), self.layout)


def _transformed(chunk: nn.Module, transform: ModelTransform, layout: ProcessLayout) -> nn.Module:
    changed = transform.apply(chunk, layout)
    for name, parameter in changed.named_parameters():
        parameter.requires_grad_(transform.trainable(name))
    return changed
