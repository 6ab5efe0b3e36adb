# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of others. Implementers match these by shape and import nothing from here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config.records import Event, LossTerms, ProcessLayout
    from torch import Tensor, nn


class SaveHandle(Protocol):
    """A save under way."""

    def wait_staged(self) -> None:
        """Return when the saved tensors may be changed."""
        ...

    def done(self) -> bool:
        """Return whether the checkpoint is durable, or has failed."""
        ...

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is durable; raise what went wrong."""
        ...


class Checkpointer(Protocol):
    """Keeps training states by step. Every method is called on all ranks together.

    A state is a nested mapping whose leaves are ``TensorShard`` records, lists of them, tensors
    that are the same on every rank, or plain data. Values of a shard with ``read_rows`` are to be read
    when they are written; only the conversion of Hugging Face folders saves such shards.
    """

    def save(self, step: int, state: Mapping[str, Any]) -> SaveHandle:
        """Begin to save *state*; it may be written in the background."""
        ...

    def load(self, state: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
        """Fill the tensors of *state* in place and return the plain data stored with them.

        Args:
            state: What to fill; any layout may read what any other wrote.
            step: Which step, None for the newest.
        """
        ...

    def steps(self) -> list[int]:
        """Return the complete steps, oldest first."""
        ...


@runtime_checkable
class Callback(Protocol):
    """Gets every record of a run, on global rank 0."""

    def on_event(self, event: Event) -> None:
        """Take one record; may raise only to stop the run."""
        ...


class ModelTransform(Protocol):
    """Changes a model after it is built and before it is wrapped for data parallelism."""

    def apply(self, model: nn.Module, layout: ProcessLayout) -> nn.Module:
        """Return the changed model; may be *model* itself."""
        ...

    def trainable(self, name: str) -> bool:
        """Return whether the parameter *name* is to be trained."""
        ...


class Objective(Protocol):
    """Turns a model's output into a loss.

    An objective may carry an attribute ``consumes``: ``"token_losses"`` (the model is given the
    labels and returns the loss of each token, ``[B, S]`` float32) or ``"logits"`` (the default:
    ``[B, S, V / tp]``, the vocabulary split over tensor-parallel ranks).
    """

    def __call__(self, output: Tensor, batch: Mapping[str, Tensor]) -> LossTerms:
        """Return the loss of one micro-batch as sums."""
        ...


class ForwardStep(Protocol):
    """Runs the model on one micro-batch, in place of the engine's own call."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the objective consumes; on earlier pipeline stages, what the model gave."""
        ...
