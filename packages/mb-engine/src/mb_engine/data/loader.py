# SPDX-License-Identifier: Apache-2.0
"""Micro-batches of one data-parallel rank: endless for training, finite for evaluation.

A data set is any object with ``__len__`` and ``__getitem__`` that returns a dict of arrays of one
shape a key. One that also has ``get_batch(index, epoch)``, which returns a dict of stacked arrays,
is asked for a whole micro-batch at once; only such a data set learns the epoch. One that also has
``plan`` and ``get_planned`` deals the samples of each step to ranks and micro-batches itself; see
``data.sft_dataset``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mb_engine.data.errors import DataError
from mb_engine.data.samplers import (
    Planned,
    SampleOrder,
    Samples,
    planned_stream,
    rank_positions,
    stream,
)
from mb_engine.train.batch_size import BatchSizeSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mb_config import ConfigContainer
    from mb_config.records import ProcessLayout
    from torch import Tensor


def batches(
    dataset: Any,
    *,
    config: ConfigContainer,
    layout: ProcessLayout,
    consumed_samples: int,
    global_batch_size: Callable[[int], int],
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's training micro-batches without end, from where *consumed_samples* left off.

    ``dataset.dataloader_type`` "single" reads the data in the order it has, and refuses a run that
    needs more than one pass; "cyclic" reads epoch after epoch, each in an order of its own if
    ``dataset.shuffle`` is set, with the remainder that fills no batch left out if
    ``dataset.drop_last`` is.

    Args:
        dataset: The training data set.
        config: Resolved.
        layout: This rank's place.
        consumed_samples: Samples that all ranks have consumed before.
        global_batch_size: Samples of the step that begins after so many consumed samples.

    Returns:
        Dicts of tensors ``[micro_batch_size, ...]``, in host memory; pinned where the device is
        CUDA and ``dataset.pin_memory`` is set, so that a copy to the device need not wait. Of a
        data set that plans, with ``global_samples`` and ``global_tokens``: how many samples, and
        tokens without filling, all data-parallel ranks read as this micro-batch.

    Raises:
        DataError: If the data set is too small, or a batch does not divide over the ranks.
    """
    settings, train = config.dataset, config.train
    order = sample_order(config, len(dataset))
    if settings.dataloader_type == "single":
        _check_one_pass(config, order)
    arguments: dict[str, Any] = {
        "consumed_samples": consumed_samples,
        "micro_batch_size": train.micro_batch_size,
        "global_batch_size": global_batch_size,
        "dp_rank": layout.dp_rank,
        "dp_size": layout.dp,
    }
    wanted: Iterable[Samples | Planned] = (
        planned_stream(order, dataset, **arguments)
        if hasattr(dataset, "plan")
        else stream(order, **arguments)
    )
    return fetch(
        dataset,
        wanted,
        num_workers=settings.num_workers,
        pin_memory=settings.pin_memory and layout.device.startswith("cuda"),
    )


def sample_order(config: ConfigContainer, size: int) -> SampleOrder:
    """Return the order in which a training set of *size* samples is read; see :func:`batches`.

    Its ``epoch_size`` is how many samples one pass over the data consumes.

    Raises:
        DataError: If the data set is too small.
    """
    settings, batch_size = config.dataset, config.train.global_batch_size
    assert batch_size is not None, "the configuration is not resolved"
    single = settings.dataloader_type == "single"
    return SampleOrder.over(
        size,
        batch_size=batch_size,
        drop_last=settings.drop_last or single,
        shuffle=settings.shuffle and not single,
        seed=config.rng.seed,
    )


def evaluation_steps(
    dataset: Any, *, config: ConfigContainer, layout: ProcessLayout
) -> Iterator[list[dict[str, Tensor]]]:
    """Yield this rank's micro-batches of each step of one evaluation.

    The samples and their order are the same at every evaluation. It ends after
    ``validation.eval_iters`` steps or at the end of the data, whichever comes first; with
    ``full_validation`` always at the end. No sample is read twice: what is missing from the last
    batch is filled up with samples whose ``loss_mask`` is zero.

    Args:
        dataset: A validation data set.
        config: Resolved.
        layout: This rank's place.

    Raises:
        DataError: If there are no samples, or a batch does not divide over the ranks.
    """
    validation, train = config.validation, config.train
    batch_size = validation.eval_global_batch_size or train.global_batch_size
    assert batch_size is not None, "the configuration is not resolved"
    return evaluation_batches(
        dataset,
        batch_size=batch_size,
        micro_batch_size=validation.eval_micro_batch_size or train.micro_batch_size,
        max_steps=None if validation.full_validation else validation.eval_iters,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp,
    )


def evaluation_batches(
    dataset: Any,
    *,
    batch_size: int,
    micro_batch_size: int,
    max_steps: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[list[dict[str, Tensor]]]:
    """Yield lists of micro-batches that cover *dataset* in order, each sample once.

    Args:
        dataset: Its batches must have a ``loss_mask`` where *batch_size* does not divide its size.
        batch_size: Samples a step, over all ranks.
        micro_batch_size: Samples a micro-batch on one rank.
        max_steps: End after so many steps; None for the end of the data.
        dp_rank: Which data-parallel rank.
        dp_size: Of how many.

    Raises:
        DataError: If there are no samples, or a batch does not divide over the ranks.
    """
    size = len(dataset)
    if size == 0:
        raise DataError("a validation data set has no samples; name more data in dataset")
    steps = -(-size // batch_size)
    for step in range(steps if max_steps is None else min(steps, max_steps)):
        positions = rank_positions(
            step * batch_size,
            batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        yield [_padded(dataset, row, size) for row in positions]


def _padded(dataset: Any, positions: Any, size: int) -> dict[str, Tensor]:
    index = np.minimum(positions, size - 1)
    batch = read(dataset, Samples(index, np.zeros_like(index)))
    beyond = torch.from_numpy(positions >= size)
    if bool(beyond.any()):
        if "loss_mask" not in batch:
            raise DataError(
                f"the last evaluation batch must be filled up, but {type(dataset).__name__} has no"
                " 'loss_mask' to keep the filling out of the loss; add it to each sample"
            )
        batch["loss_mask"] = batch["loss_mask"].clone()
        batch["loss_mask"][beyond] = 0
    return batch


def fetch(
    dataset: Any,
    wanted: Iterable[Samples | Planned],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Yield the batch of each of *wanted*, in order.

    Args:
        dataset: What to read.
        wanted: Which samples make up each batch.
        num_workers: Processes that read ahead; 0 reads here, when asked.
        pin_memory: Put the tensors into page-locked memory.
    """
    reader = _Reader(dataset)
    if num_workers == 0:
        for samples in wanted:
            batch = reader[samples]
            yield {k: v.pin_memory() for k, v in batch.items()} if pin_memory else batch
        return
    loader: DataLoader[Any] = DataLoader(
        reader,
        sampler=wanted,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else it draws from torch's own, and a run's dropout differs
    )
    yield from loader


def read(dataset: Any, samples: Samples | Planned) -> dict[str, Tensor]:
    """Return one batch of *dataset* as tensors ``[len(samples.index), ...]``.

    Raises:
        DataError: If the samples cannot be stacked.
    """
    if isinstance(samples, Planned):
        plan = samples.plan
        planned = dataset.get_planned(samples.index, plan.width)
        planned |= {"global_samples": plan.samples, "global_tokens": plan.tokens}
        return {name: torch.as_tensor(values) for name, values in planned.items()}
    if hasattr(dataset, "get_batch"):
        stacked = dataset.get_batch(samples.index, samples.epoch)
        return {name: torch.as_tensor(values) for name, values in stacked.items()}
    items = [dataset[int(i)] for i in samples.index]
    return {name: _stack(dataset, name, items) for name in items[0]}


def _stack(dataset: Any, name: str, items: list[dict[str, Any]]) -> Tensor:
    tensors = [torch.as_tensor(item[name]) for item in items]
    shapes = sorted({tuple(t.shape) for t in tensors})
    if len(shapes) > 1:
        raise DataError(
            f"samples of {type(dataset).__name__} differ in the shape of {name!r}:"
            f" {', '.join(map(str, shapes))}; pad them to one length"
        )
    return torch.stack(tensors)


class _Reader(Dataset[dict[str, "Tensor"]]):
    """Reads whole batches, so that torch's loader need not know about samples."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, samples: Samples | Planned) -> dict[str, Tensor]:
        return read(self.dataset, samples)


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_one_pass(config: ConfigContainer, order: SampleOrder) -> None:
    """Refuse, before the first step, a run that would need more than one pass over the data."""
    steps = config.train.train_iters
    needed = BatchSizeSchedule.from_config(config).samples_at_iteration(steps) if steps else 0
    if needed > order.epoch_size:
        raise DataError(
            f"dataset.dataloader_type=single reads the {order.size} training samples once,"
            f" {order.epoch_size} of them in whole batches, but train.train_iters={steps} needs"
            f" {needed}; set it to cyclic to go on with further epochs, or train for less"
        )
