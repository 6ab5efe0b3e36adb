# SPDX-License-Identifier: Apache-2.0
"""SFT samples as training reads them: padded, packed beforehand, or packed step by step.

Shape suffixes are those of ``parallel.sequence``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from attrs import define, field

from mb_engine.data.errors import DataError
from mb_engine.data.packing import assign, spread
from mb_engine.data.samplers import StepPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mb_engine.data.sample_store import SampleStore

Packing = Literal["none", "in_batch", "offline"]


@define(kw_only=True, eq=False)
class SFTDataset:
    """A map-style data set over prepared rows.

    Attributes:
        store: The rows.
        seq_length: Tokens of a padded row, S.
        pad_id: What fills up.
        packing: How samples share rows; ``"offline"`` if those of *store* hold several.
        multiple: What the length of a packed sample is padded to.
        row_multiple: What the length of a row that is packed in a batch is padded to.
    """

    store: SampleStore
    seq_length: int
    pad_id: int
    packing: Packing = "none"
    multiple: int = 1
    row_multiple: int = 1
    _lengths: NDArray[np.int64] = field(init=False, repr=False)
    _padded: NDArray[np.int64] = field(init=False, repr=False)
    _row_work: NDArray[np.int64] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._lengths = self.store.lengths()
        self._padded = -(-self._lengths // self.multiple) * self.multiple
        begins, samples = self.store.rows[:-1], self.store.samples[:-1]
        learnt = np.add.reduceat(self.store.learnt, samples, dtype=np.int64)
        learnt -= self.store.learnt[samples]  # nothing predicts the first
        work = np.stack([self._lengths, self._padded**2, learnt])
        self._row_work = np.add.reduceat(work, begins, axis=1)

    def __len__(self) -> int:
        return len(self.store)

    def sample_lengths(self, at_most: int = 4096) -> list[int]:
        """Return the tokens of samples spread evenly over the set, which stand for all of them."""
        step = max(1, -(-len(self._lengths) // at_most))
        return [int(length) for length in self._lengths[::step]]

    def plan(
        self, index: NDArray[np.int64], *, micro_batches: int, ranks: int
    ) -> Sequence[StepPlan]:
        """Return what each rank reads of a step; each row of *index* is read once.

        Args:
            index: int64 ``[G]``: the rows of the step.
            micro_batches: How many each rank runs.
            ranks: Data-parallel ranks.

        Returns:
            One plan a micro-batch.
        """
        tokens, squares, learnt = self._row_work[:, index]
        width = self.seq_length
        if self.packing == "none":
            table = np.arange(len(index)).reshape(micro_batches, ranks, -1)
            groups = [list(table[m]) for m in range(micro_batches)]
        else:
            rows: list[NDArray[np.int64]] = list(np.arange(len(index)).reshape(-1, 1))
            if self.packing == "in_batch":
                sizes = self._padded[index]
                rows = spread(sizes, micro_batches * ranks)
                longest = max(int(sizes[row].sum()) for row in rows)
                width = -(-longest // self.row_multiple) * self.row_multiple
            costs = [int(squares[row].sum()) for row in rows]
            chosen = assign(costs, [int(learnt[row].sum()) for row in rows], ranks)
            groups = [[rows[chosen[m, r]] for r in range(ranks)] for m in range(micro_batches)]
        return [
            StepPlan(
                index=[index[part] for part in group],
                width=width,
                samples=sum(map(len, group)),
                tokens=int(sum(tokens[part].sum() for part in group)),
            )
            for group in groups
        ]

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """Return row *index* alone; see :meth:`get_batch`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        only = np.array([index % len(self)])
        batch = self.get_batch(only, np.zeros(1, dtype=np.int64))
        return {k: v[0] if v.ndim > 1 else v for k, v in batch.items()}

    def get_batch(
        self, index: NDArray[np.int64], epoch: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Return the rows at *index* ``[B]``: padded, or one that is packed beforehand.

        Raises:
            DataError: If several rows that are packed are asked for at once.
        """
        del epoch
        if self.packing == "offline":
            return self.get_packed(index, self.seq_length)
        batch = self._blank(len(index), self.seq_length)
        for row, number in enumerate(index.tolist()):
            self._fill(batch, row, 0, int(self.store.rows[number]))
            batch["position_ids"][row] = np.arange(self.seq_length)
        return batch

    def get_planned(self, index: NDArray[np.int64], width: int) -> dict[str, NDArray[Any]]:
        """Return one rank's micro-batch of a plan; see :meth:`get_batch` and :meth:`get_packed`."""
        if self.packing == "none":
            return self.get_batch(index, np.zeros_like(index))
        return self.get_packed(index, width)

    def get_packed(self, index: NDArray[np.int64], width: int) -> dict[str, NDArray[Any]]:
        """Return the samples of the rows at *index* in one row.

        Args:
            index: Rows; one if they are packed beforehand.
            width: Tokens of the row, T.

        Returns:
            int64 ``[1, T]`` ``tokens``, ``labels`` and ``position_ids``, which begin anew with each
            sample; float32 ``[1, T]`` ``loss_mask``; int32 ``[n + 1]`` ``cu_seqlens``, the last of
            them the filling; int64 ``max_seqlen``, the same for all rows of the data set.

        Raises:
            DataError: If several rows that are packed are asked for at once.
        """
        if self.packing == "offline" and len(index) != 1:
            raise DataError(
                f"{len(index)} packed rows were asked for as one micro-batch; set"
                " train.micro_batch_size=1 and validation.eval_micro_batch_size=1"
            )
        batch = self._blank(1, width)
        rows = self.store.rows
        held = np.concatenate([np.arange(rows[i], rows[i + 1]) for i in index] or [index])
        longest = int(self._padded.max())
        sizes = self._padded[held].tolist()
        rest = width - sum(sizes)
        while rest:  # no longer than a sample, for kernels that are made for the longest
            sizes.append(min(rest, longest))
            rest -= sizes[-1]
        starts = np.cumsum([0, *sizes])
        for start, sample in zip(starts, held, strict=False):
            self._fill(batch, 0, int(start), int(sample))
        batch["position_ids"][0] = np.arange(width) - np.repeat(starts[:-1], sizes)
        batch["cu_seqlens"] = starts.astype(np.int32)
        batch["max_seqlen"] = np.array(longest)
        return batch

    def _blank(self, rows: int, width: int) -> dict[str, NDArray[Any]]:
        shape = (rows, width)
        return {
            "tokens": np.full(shape, self.pad_id, dtype=np.int64),
            "labels": np.full(shape, self.pad_id, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
            "loss_mask": np.zeros(shape, dtype=np.float32),
        }

    def _fill(self, batch: dict[str, NDArray[Any]], row: int, start: int, sample: int) -> None:
        begin, end = self.store.samples[sample], self.store.samples[sample + 1]
        place = slice(start, start + int(self._lengths[sample]))
        batch["tokens"][row, place] = self.store.ids[begin : end - 1]
        batch["labels"][row, place] = self.store.ids[begin + 1 : end]
        batch["loss_mask"][row, place] = self.store.learnt[begin + 1 : end]
