# SPDX-License-Identifier: Apache-2.0
"""The global order of samples: a pure function of (seed, position), for every parallel layout.

Position ``p`` of the endless stream is the ``p``-th sample of training. Epoch ``p // epoch_size``
reads the data set once, in an order of its own when shuffled. A rank only chooses which positions
it reads, so the order does not depend on how many ranks there are or how large a micro-batch is,
and a checkpoint needs to keep no more than the number of samples consumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from mb_engine.data import hashing
from mb_engine.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

_ROUNDS = 6
_SMALL = 1024  # below, a Feistel network has too few keys to make all orders equally likely
_READ_AHEAD = 4096  # positions: one call a block, as a call costs as much as a thousand positions
_SHUFFLE = 1  # keeps the keys of shuffles apart from those of other uses of the seed


def permute(index: NDArray[np.int64], size: int, *, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """Return where a pseudo-random permutation of ``range(size)`` takes each of *index*.

    Each call costs time and memory in ``len(index)`` alone, however large *size* is.

    Source: up to 1024, the order of hashes; beyond, a balanced Feistel network over the next power of four, walked until it falls below
    *size* (Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9, "cycle walking").
    """
    if size <= _SMALL:
        drawn = hashing.hash_index(np.arange(size), hashing.key(seed, epoch, _SHUFFLE))
        return np.argsort(drawn, kind="stable")[index]
    half = ((size - 1).bit_length() + 1) // 2
    keys = [hashing.key(seed, epoch, _SHUFFLE, r) for r in range(_ROUNDS)]
    values = _feistel(index.astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = _feistel(values[outside], half, keys)
        values[outside] = walked
        outside = outside[walked >= size]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: list[int]) -> NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (hashing.mix(right ^ np.uint64(key)) & mask)
    return (left << shift) | right


@frozen(eq=False)
class Samples:
    """Which samples to read: two arrays of one length.

    Attributes:
        index: int64, below the length of the data set.
        epoch: int64, how often the data set has been read before.
    """

    index: NDArray[np.int64]
    epoch: NDArray[np.int64]


@frozen(kw_only=True, eq=False)
class StepPlan:
    """What all ranks read as one micro-batch, where the data set decides who reads what.

    Attributes:
        index: Of each data-parallel rank: int64, which samples.
        width: Tokens of a row.
        samples: Of all ranks together.
        tokens: Of these samples, without any filling.
    """

    index: Sequence[NDArray[np.int64]]
    width: int
    samples: int
    tokens: int


@frozen(kw_only=True, eq=False)
class Planned:
    """One rank's part of a :class:`StepPlan`.

    Attributes:
        index: Which samples.
        plan: What it is a part of.
    """

    index: NDArray[np.int64]
    plan: StepPlan


@frozen(kw_only=True)
class SampleOrder:
    """The endless stream of samples of one data set.

    Attributes:
        size: Samples in the data set.
        epoch_size: Samples read in an epoch; less than ``size`` where a remainder is dropped.
        shuffle: Each epoch in an order of its own, or always in the order of the data set.
        seed: Of the orders.
    """

    size: int = field(validator=ge(1))
    epoch_size: int = field(validator=ge(1))
    shuffle: bool = True
    seed: int = 1234

    @classmethod
    def over(
        cls, size: int, *, batch_size: int, drop_last: bool, shuffle: bool, seed: int
    ) -> SampleOrder:
        """Return the order over a data set of *size* samples.

        Args:
            size: Samples in the data set.
            batch_size: The global batch size, after any ramp-up.
            drop_last: Leave out the remainder of an epoch that fills no batch; otherwise the batch
                at the end of an epoch is filled from the next one.
            shuffle: A new order each epoch.
            seed: Of the orders.

        Raises:
            DataError: If there are no samples, or fewer than one batch and the rest is dropped.
        """
        if size == 0:
            raise DataError("the training data set has no samples; name more data in dataset")
        epoch_size = size - size % batch_size if drop_last else size
        if epoch_size == 0:
            raise DataError(
                f"the training data set has {size} samples, fewer than one global batch of"
                f" {batch_size}; lower train.global_batch_size or dataset.seq_length, set"
                " dataset.drop_last=false, or add data"
            )
        return cls(size=size, epoch_size=epoch_size, shuffle=shuffle, seed=seed)

    def at(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at *positions* of the stream."""
        epoch, place = np.divmod(positions, self.epoch_size)
        if not self.shuffle:
            return Samples(place, epoch)
        index = np.empty_like(place)
        for one in np.unique(epoch):
            here = epoch == one
            index[here] = permute(place[here], self.size, seed=self.seed, epoch=int(one))
        return Samples(index, epoch)


def rank_positions(
    start: int, batch_size: int, *, micro_batch_size: int, dp_rank: int, dp_size: int
) -> NDArray[np.int64]:
    """Return the positions that one data-parallel rank reads of the batch that begins at *start*.

    Micro-batch ``m`` of all ranks together is one contiguous piece of the batch.

    Returns:
        int64 ``[batch_size / (micro_batch_size * dp_size), micro_batch_size]``, a row a micro-batch.

    Raises:
        DataError: If the batch does not divide evenly.
    """
    together = micro_batch_size * dp_size
    if batch_size < 1 or batch_size % together:
        raise DataError(
            f"a global batch of {batch_size} is not a multiple of micro_batch_size * data-parallel"
            f" size = {micro_batch_size} * {dp_size}; change train.global_batch_size"
        )
    first = start + micro_batch_size * dp_rank
    rows = np.arange(first, first + batch_size, together, dtype=np.int64)
    return rows[:, None] + np.arange(micro_batch_size, dtype=np.int64)


def stream(
    order: SampleOrder,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: Callable[[int], int],
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Samples]:
    """Yield the samples of each micro-batch of one data-parallel rank, without end.

    Args:
        order: Of the samples.
        consumed_samples: Samples that all ranks have consumed before.
        micro_batch_size: Samples a micro-batch on one rank.
        global_batch_size: Samples of the step that begins after so many consumed samples.
        dp_rank: Which data-parallel rank.
        dp_size: Of how many.
    """
    ahead, begin = order.at(np.arange(0, dtype=np.int64)), consumed_samples
    while True:
        batch_size = global_batch_size(consumed_samples)
        positions = rank_positions(
            consumed_samples,
            batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        if consumed_samples + batch_size > begin + len(ahead.index):
            begin = consumed_samples
            length = max(batch_size, min(_READ_AHEAD, order.epoch_size))
            block = np.arange(begin, begin + length, dtype=np.int64)
            ahead = order.at(block)
        for row in positions - begin:
            yield Samples(ahead.index[row], ahead.epoch[row])
        consumed_samples += batch_size


def planned_stream(
    order: SampleOrder,
    dataset: Any,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: Callable[[int], int],
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Planned]:
    """Yield what one rank reads, where ``dataset.plan`` deals the samples of each step to the ranks.

    A step has the same samples for any number of ranks; see :func:`stream` for the arguments.

    Raises:
        DataError: If a batch does not divide over the ranks.
    """
    while True:
        size = global_batch_size(consumed_samples)
        rank_positions(
            consumed_samples,
            size,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        samples = order.at(np.arange(consumed_samples, consumed_samples + size, dtype=np.int64))
        count = size // (micro_batch_size * dp_size)
        for plan in dataset.plan(samples.index, micro_batches=count, ranks=dp_size):
            yield Planned(index=plan.index[dp_rank], plan=plan)
        consumed_samples += size
