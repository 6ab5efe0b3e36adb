# SPDX-License-Identifier: Apache-2.0
"""Packing: which samples share a row, and which rank works on which row.

A row costs the same number of tokens whatever it holds, but attention costs the sum of the squares
of the lengths of its samples, so rows of one long sample take longer than rows of many short ones.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from mb_engine.data.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Indices = NDArray[np.int64]


@frozen(kw_only=True, eq=False)
class Packed:
    """Samples put into bins; see :func:`pack`.

    Attributes:
        order: int64 ``[N]``: all samples, bin after bin, each bin's in the order of the data.
        starts: int64 ``[bins + 1]``: where in ``order`` each bin begins, and the end.
        capacity: Tokens that a bin can hold.
        tokens: Tokens of all samples together.
    """

    order: Indices
    starts: Indices
    capacity: int
    tokens: int

    def __len__(self) -> int:
        """Return the number of bins."""
        return len(self.starts) - 1

    def bin(self, number: int) -> Indices:
        """Return the samples of one bin."""
        return self.order[self.starts[number] : self.starts[number + 1]]

    @property
    def lower_bound(self) -> int:
        """How many bins their tokens would fill without a gap; no packing needs fewer."""
        return -(-self.tokens // self.capacity)

    @property
    def efficiency(self) -> float:
        """The share of all bins that is filled with tokens."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0

    def report(self) -> dict[str, Any]:
        """Return the figures of the packing as plain data."""
        return {
            "samples": len(self.order),
            "bins": len(self),
            "capacity": self.capacity,
            "efficiency": round(self.efficiency, 6),
            "lower_bound": self.lower_bound,
            "samples_per_bin": round(len(self.order) / max(1, len(self)), 3),
        }


def pack(lengths: ArrayLike, capacity: int) -> Packed:
    """Return a best-fit decreasing packing of samples into bins.

    Each sample, the longest first, goes into the fullest bin that has room. Bins with equal room
    are handled together, as are samples of equal length, so that a million samples take about as
    long as sorting them. At most 11/9 of the best possible number of bins, plus one. Source: best
    fit decreasing, D. S. Johnson 1974, doi:10.1137/0203025; the grouping is own.

    Args:
        lengths: Integers ``[N]``, of each sample, 1 to *capacity*.
        capacity: Tokens that a bin can hold.

    Raises:
        DataError: If a sample is longer than a bin, or empty.

    Cost: O(N log N + d * capacity / 64), with d distinct lengths.
    """
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if sizes.size and (sizes.min() < 1 or sizes.max() > capacity):
        worst = int(sizes.max()) if sizes.max() > capacity else int(sizes.min())
        raise DataError(
            f"a sample of {worst} tokens cannot be packed into rows of {capacity}; drop or truncate"
            " it, or raise dataset.seq_length"
        )
    by_size = np.argsort(-sizes, kind="stable")
    where = np.empty(len(sizes), dtype=np.int64)
    distinct, counts = np.unique(sizes, return_counts=True)
    bins, begin = _Bins(capacity), 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        where[by_size[begin : begin + count]] = bins.place(size, count)
        begin += count
    order = np.argsort(where, kind="stable")
    starts = np.searchsorted(where[order], np.arange(bins.count + 1))
    return Packed(order=order, starts=starts, capacity=capacity, tokens=int(sizes.sum()))


class _Bins:
    """Bins by how much room they have left."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self._with_room: dict[int, list[Indices]] = {}
        self._rooms = 0  # bit r is set where some bin has room r

    def place(self, size: int, count: int) -> Indices:
        """Put *count* samples of *size* where they fit best; return the bin of each."""
        found: list[Indices] = []
        while count:
            fitting = self._rooms >> size
            if not fitting:
                found.append(self._open(size, count))
                break
            room = size + (fitting & -fitting).bit_length() - 1
            bins = self._take(room)
            each = room // size  # what is left of a bin fits best again
            full, rest = divmod(count, each)
            if full >= len(bins):
                used, rest, kept = len(bins), 0, bins[:0]
            else:
                used, kept = full, bins[full + bool(rest) :]
            found.append(np.repeat(bins[:used], each))
            self._give(room - each * size, bins[:used])
            count -= used * each
            if rest and used == full:
                found.append(np.repeat(bins[full : full + 1], rest))
                self._give(room - rest * size, bins[full : full + 1])
                count -= rest
            self._give(room, kept)
        return np.concatenate(found)

    def _open(self, size: int, count: int) -> Indices:
        each = self.capacity // size
        full, rest = divmod(count, each)
        bins = np.arange(self.count, self.count + full + bool(rest), dtype=np.int64)
        self.count += len(bins)
        self._give(self.capacity - each * size, bins[:full])
        if rest:
            self._give(self.capacity - rest * size, bins[full:])
        return np.repeat(bins, each)[:count]

    def _take(self, room: int) -> Indices:
        self._rooms &= ~(1 << room)
        parts = self._with_room.pop(room)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _give(self, room: int, bins: Indices) -> None:
        if len(bins) and room:
            self._with_room.setdefault(room, []).append(bins)
            self._rooms |= 1 << room


def spread(lengths: ArrayLike, rows: int) -> list[Indices]:
    """Return which samples share each of a given number of rows, so that the longest row is short.

    Each sample, the longest first, goes to the row with the fewest tokens, of those with equally
    many to the first. Source: longest processing time first, R. L. Graham 1969,
    doi:10.1137/0117039: at most 4/3 of the shortest possible.

    Args:
        lengths: Integers ``[N]``.
        rows: How many rows; with fewer samples than that, some stay empty.

    Returns:
        int64, one array a row, in the order of the data.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    loads = [(0, row) for row in range(rows)]
    found: list[list[int]] = [[] for _ in range(rows)]
    for sample in np.argsort(-sizes, kind="stable").tolist():
        load, row = loads[0]
        found[row].append(sample)
        heapq.heapreplace(loads, (load + int(sizes[sample]), row))
    return [np.array(sorted(samples), dtype=np.int64) for samples in found]


def assign(costs: ArrayLike, loss_tokens: ArrayLike, ranks: int) -> Indices:
    """Return which row each data-parallel rank reads as each micro-batch of one step.

    Rows of about equal attention cost become one micro-batch, so that ranks that wait for each
    other in it wait little; which rank gets which of them is chosen so that the ranks have about the
    same to do in all, in attention and in loss tokens alike.

    Args:
        costs: ``[M * ranks]``, of each row of a step: the sum of squares of its lengths.
        loss_tokens: ``[M * ranks]``, tokens of each row that count for the loss.
        ranks: How many.

    Returns:
        int64 ``[M, ranks]``, each row once.
    """
    work = np.stack([_relative(costs), _relative(loss_tokens)], axis=1)
    table = np.argsort(-work[:, 0], kind="stable").reshape(-1, ranks)
    loads = np.zeros((ranks, 2))
    for stratum in table:
        most_first = stratum[np.argsort(-work[stratum].sum(1), kind="stable")]
        stratum[np.argsort(loads.sum(1), kind="stable")] = most_first
        loads += work[stratum]
    for _ in range(_SWEEPS):
        swapped = [_swap(stratum, work, loads) for stratum in table]
        if not any(swapped):
            break
    return table


_SWEEPS, _SWAPS = 4, 8  # enough for a balance that further ones hardly better


def _swap(stratum: Indices, work: NDArray[np.float64], loads: NDArray[np.float64]) -> bool:
    """Swap rows between ranks while that lowers the sum of squares of what the ranks have to do."""
    for done in range(_SWAPS):
        mine = work[stratum]
        change = mine[None] - mine[:, None]  # [r, s]: what r gets for its row if it takes that of s
        gain = (change * (loads[:, None] - loads[None] + change)).sum(-1)
        r, s = divmod(int(gain.argmin()), len(stratum))
        if gain[r, s] > -1e-9:
            return done > 0
        loads[r] += change[r, s]
        loads[s] -= change[r, s]
        stratum[[r, s]] = stratum[[s, r]]
    return True


def _relative(amounts: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(amounts, dtype=np.float64)
    return found / max(float(found.mean()), 1e-9)


def imbalance(work: ArrayLike) -> float:
    """Return by how much the most loaded rank exceeds the mean, as a share of it.

    Args:
        work: ``[micro-batches, ranks]``.
    """
    totals = np.asarray(work, dtype=np.float64).sum(axis=0)
    return float(totals.max() / totals.mean() - 1) if totals.mean() else 0.0
