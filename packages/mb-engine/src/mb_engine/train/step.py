# SPDX-License-Identifier: Apache-2.0
"""One forward-backward pass over micro-batches through megatron-core's pipeline schedules."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, evolve, field
from mb_config.records import LossTerms

from mb_engine.errors import EngineError
from mb_engine.model.auxiliary_losses import AuxiliaryLosses
from mb_engine.parallel.sequence import (
    BOUNDARIES,
    LONGEST,
    context_parallel_slice,
    read_packing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mb_config.records import ProcessLayout
    from torch import Tensor

    from mb_engine.interfaces import ForwardStep, Objective

_LOSS = "loss"
_PACKED = "packed_seq_params"
_MASK = "loss_mask"
_SAMPLES, _TOKENS = "global_samples", "global_tokens"
_OF_THE_HOST = {BOUNDARIES, LONGEST, _SAMPLES, _TOKENS}


@define(kw_only=True)
class MicroBatchRunner:
    """Feeds micro-batches to a pipeline schedule and adds up what the objective returns.

    Attributes:
        chunks: Model chunks of this rank, wrapped for data parallelism.
        layout: Where this rank is.
        objective: Turns the model's output into sums.
        forward_step: Calls the model; None for the default call.
    """

    chunks: list[Any]
    layout: ProcessLayout
    objective: Objective
    forward_step: ForwardStep | None = None
    _metric_names: tuple[str, ...] | None = field(default=None, init=False)
    _schedule: Callable[..., Any] | None = field(default=None, init=False)
    _beside: AuxiliaryLosses | None = field(default=None, init=False)

    def run(
        self, batches: Sequence[Mapping[str, Tensor]], *, forward_only: bool = False
    ) -> LossTerms:
        """Run all *batches* forward, and backward unless *forward_only*.

        Args:
            batches: This data-parallel rank's micro-batches; tensors ``[B, S]``, all of one shape,
                with ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``. A micro-batch of
                one row with ``cu_seqlens`` is packed: its samples do not see each other
                (:func:`mb_engine.parallel.sequence.read_packing`).
            forward_only: Compute the loss alone.

        Returns:
            Sums over all micro-batches of all data-parallel ranks, the same on every rank.

        Raises:
            EngineError: If there are no micro-batches, they differ in shape, or are packed wrongly.
        """
        shape = _common_shape(batches)
        local = self.localize(batches)
        store = self.schedule()(
            forward_step_func=self._forward_step,
            data_iterator=self._iterators(local),
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(local),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=forward_only,
        )
        terms = self._reduce(store)
        if forward_only:
            return terms
        if self._beside is None:
            self._beside = AuxiliaryLosses(self.chunks, self.layout)
        beside = self._beside.take(num_microbatches=len(local))
        return evolve(terms, metrics={**terms.metrics, **beside})

    def schedule(self) -> Callable[..., Any]:
        """Return megatron-core's schedule for this pipeline layout."""
        if self._schedule is None:
            from megatron.core.pipeline_parallel import get_forward_backward_func

            from mb_engine.model.cuda_graphs import with_cuda_graphs

            self._schedule = with_cuda_graphs(get_forward_backward_func(), self.chunks)
        return self._schedule

    def localize(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
        """Return *batches* on this rank's device, cut to its context-parallel part.

        Packed ones have ``packed_seq_params`` in place of their boundaries.
        """
        return [self._localize(batch) for batch in batches]

    def _localize(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        layout = self.layout
        device = torch.device(layout.device)
        packing = read_packing(batch, cp=layout.cp)
        local: dict[str, Any] = context_parallel_slice(
            {
                k: v if v.device == device else v.to(device, non_blocking=True)
                for k, v in batch.items()
                if k not in _OF_THE_HOST
            },
            cp=layout.cp,
            cp_rank=layout.cp_rank,
            lengths=packing.lengths if packing is not None else None,
        )
        if packing is not None:
            from mb_engine.model.attention.packed import PackedSequences

            local[_PACKED] = PackedSequences.of(
                packing, device=device, cp=layout.cp, cp_rank=layout.cp_rank
            )
        return local

    def _iterators(self, local: list[dict[str, Any]]) -> Any:
        if len(self.chunks) == 1:
            return iter(local)
        return [iter(local) for _ in self.chunks]

    def _forward_step(
        self,
        data_iterator: Iterator[Mapping[str, Any]],
        model: Any,
        return_schedule_plan: bool = False,
    ) -> Any:
        batch = next(data_iterator)
        if self.forward_step is not None and return_schedule_plan:
            raise EngineError(
                "comm_overlap.overlap_moe_expert_parallel_comm=True: the pipeline schedule calls the"
                " model itself, and this run has a forward_step of its own; leave one of them out"
            )
        if self.forward_step is not None:
            output = self.forward_step(model, batch)
        else:
            token_losses = getattr(self.objective, "consumes", "logits") == "token_losses"
            packed = batch.get(_PACKED)
            # With overlapped experts the schedule runs the layers, by a plan of the model.
            call = model.build_schedule_plan if return_schedule_plan else model
            output = call(
                batch["tokens"],
                batch.get("position_ids"),
                None,
                labels=batch["labels"] if token_losses else None,
                **({} if packed is None else {_PACKED: packed}),
                **({_MASK: batch[_MASK]} if self._predicts_ahead() else {}),
            )
        return output, partial(self._loss, batch)

    def _predicts_ahead(self) -> bool:
        """Return whether the model computes losses of its own, for which it needs the mask."""
        from megatron.core.utils import get_model_config

        return bool(getattr(get_model_config(self.chunks[0]), "mtp_num_layers", None))

    def _loss(self, batch: Mapping[str, Tensor], output: Tensor) -> Any:
        terms = self.objective(output, batch)
        num_tokens = terms.num_tokens.int()
        sums = {_LOSS: (terms.loss_sum.detach(), num_tokens), **terms.metrics}
        # A copy: without calculate_per_token_loss the schedule divides it in place.
        return terms.loss_sum.clone(), num_tokens, sums

    def _reduce(self, store: list[dict[str, tuple[Tensor, Tensor]]]) -> LossTerms:
        """Add up micro-batches and data-parallel ranks; hand the sums to all pipeline stages."""
        last_stage = self.layout.pp_rank == self.layout.pp - 1
        names = self._names(store if last_stage else None)
        # Float64 counts tokens exactly and keeps the sum independent of how it was split.
        if last_stage:
            rows = [torch.stack([x for n in names for x in sums[n]]).double() for sums in store]
            packed = torch.stack(rows).sum(0) if len(rows) > 1 else rows[0]
            if self.layout.dp * self.layout.cp > 1:
                torch.distributed.all_reduce(packed, group=self.layout.groups["dp_cp"])
        else:
            packed = torch.empty(2 * len(names), dtype=torch.float64, device=self.layout.device)
        if self.layout.pp > 1:
            group = self.layout.groups["pp"]
            source = torch.distributed.get_global_rank(group, self.layout.pp - 1)
            torch.distributed.broadcast(packed, source, group=group)
        pairs = dict(zip(names, zip(packed[0::2], packed[1::2], strict=True), strict=True))
        loss_sum, num_tokens = pairs.pop(_LOSS)
        return LossTerms(loss_sum=loss_sum, num_tokens=num_tokens, metrics=pairs)

    def _names(self, store: list[dict[str, Any]] | None) -> tuple[str, ...]:
        """Return the metric names; earlier stages learn them from the last one, once."""
        if self._metric_names is None:
            names = [tuple(store[0]) if store else None]
            if self.layout.pp > 1:
                group = self.layout.groups["pp"]
                source = torch.distributed.get_global_rank(group, self.layout.pp - 1)
                torch.distributed.broadcast_object_list(names, source, group=group)
            self._metric_names = names[0] or (_LOSS,)
        return self._metric_names


def counted(batches: Sequence[Mapping[str, Tensor]], dp: int) -> tuple[int, int]:
    """Return how many samples and tokens all data-parallel ranks have in a step.

    Where the data set has counted them (``global_samples``, ``global_tokens``), tokens that only fill
    rows are not among them.
    """
    samples = [int(b[_SAMPLES]) if _SAMPLES in b else b["tokens"].size(0) * dp for b in batches]
    tokens = [int(b[_TOKENS]) if _TOKENS in b else b["tokens"].numel() * dp for b in batches]
    return sum(samples), sum(tokens)


def _common_shape(batches: Sequence[Mapping[str, Tensor]]) -> tuple[int, int]:
    shapes = {tuple(b["tokens"].shape) for b in batches}
    if len(shapes) != 1:
        found = ", ".join(map(str, sorted(shapes))) or "none"
        raise EngineError(
            f"micro-batches of one step must have one token shape [B, S], found: {found}"
        )
    rows, columns = shapes.pop()
    return rows, columns
