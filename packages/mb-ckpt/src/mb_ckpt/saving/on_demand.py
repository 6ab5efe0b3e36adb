# SPDX-License-Identifier: Apache-2.0
"""Values that are read while they are written, so that a state may be larger than the memory."""

from __future__ import annotations

from bisect import bisect_right
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import frozen

from mb_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mb_ckpt.format.tensorstore_io import Bytes
    from mb_ckpt.saving.planning import Part, Share
    from mb_ckpt.states.storable import Rows

BLOCK_BYTES = 16 << 20
"""Most bytes that are read at a time, unless one row is more."""


@frozen(kw_only=True, eq=False)
class _Source:
    """What lies in a run of bytes.

    Attributes:
        key: Of the tensor, for messages.
        start: First byte of the share.
        shape: Of the values.
        dtype: Of the values.
        read: Returns rows of them.
    """

    key: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    def values(self, first: int, last: int) -> torch.Tensor:
        """Return the rows ``first:last``.

        Raises:
            CheckpointError: If something else is read than the shard says.
        """
        found = self.read(first, last)
        expected = (last - first, *self.shape[1:])
        if found.dtype != self.dtype or tuple(found.shape) != expected:
            raise CheckpointError(
                f"shard {self.key!r}: read_rows({first}, {last}) returned {found.dtype} "
                f"{list(found.shape)}, expected {self.dtype} {list(expected)}"
            )
        return found


class BytesOnDemand:
    """The bytes of a rank's share, read when a slice of them is asked for.

    Asked for in order, every value is read once: the block that was read last is kept.

    Args:
        share: Which bytes.
        tensors: All of this rank's pieces.
        readers: By index of the piece, what returns rows of it; its tensor is on ``meta``.
    """

    def __init__(
        self, share: Share, tensors: Sequence[torch.Tensor], readers: Mapping[int, Rows]
    ) -> None:
        self._total = share.total
        self._sources = [
            _source(part, share.specs[part.index].key, tensors[part.index], readers.get(part.index))
            for part in share.parts
        ]
        self._starts = [source.start for source in self._sources]
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._kept = (-1, -1)

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, where: slice) -> Bytes:
        """Return a copy of the bytes ``where``, with zeros between pieces."""
        start, stop, _ = where.indices(self._total)
        out = np.zeros(max(0, stop - start), np.uint8)
        first = max(0, bisect_right(self._starts, start) - 1)
        for i in range(first, len(self._sources)):
            source = self._sources[i]
            if source.start >= stop:
                break
            end = source.start + source.shape[0] * source.row_bytes
            at, end = max(start, source.start), min(stop, end)
            while at < end:
                block, begin = self._block(i, at - source.start)
                begin += source.start
                taken = block[at - begin : end - begin]
                out[at - start : at - start + len(taken)] = taken
                at += len(taken)
        return out

    def _block(self, i: int, byte: int) -> tuple[Bytes, int]:
        """Return the block of a source that *byte* of it lies in, and the block's first byte."""
        source = self._sources[i]
        rows = max(1, BLOCK_BYTES // source.row_bytes)
        number = byte // (rows * source.row_bytes)
        first, last = number * rows, min(source.shape[0], (number + 1) * rows)
        if self._kept != (i, number):
            self._kept = (-1, -1)
            self._memory = torch.empty(0, dtype=torch.uint8)  # first: never two blocks
            values = source.values(first, last).detach().to("cpu").contiguous()
            self._memory = values.view(-1).view(torch.uint8)
            self._kept = (i, number)
        return self._memory.numpy(), first * source.row_bytes


def _source(part: Part, key: str, tensor: torch.Tensor, reader: Rows | None) -> _Source:
    held = tensor.detach() if part.rows is None else tensor.detach().narrow(*part.rows)
    held = held if held.dim() else held.view(1)
    return _Source(
        key=key,
        start=part.start,
        shape=tuple(held.shape),
        dtype=held.dtype,
        read=_rows_of(held) if reader is None else _narrowed(reader, part.rows),
    )


def _rows_of(held: torch.Tensor) -> Rows:
    def read(first: int, last: int) -> torch.Tensor:
        return held[first:last]

    return read


def _narrowed(reader: Rows, rows: tuple[int, int, int] | None) -> Rows:
    """Return *reader* for a part of its values: ``(dimension, first, count)``, None for all."""

    def read(first: int, last: int) -> torch.Tensor:
        if rows is None:
            return reader(first, last)
        dimension, start, count = rows
        if dimension == 0:
            return reader(start + first, start + last)
        return reader(first, last).narrow(dimension, start, count)

    return read
