# SPDX-License-Identifier: Apache-2.0
"""Algebra of boxes: which part of a stored piece belongs where in a wanted one. Pure integers."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np
from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@frozen
class Box:
    """The indices ``offset[d] <= i[d] < offset[d] + shape[d]`` of an array."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a 0-d box."""
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """Return the common box, or None where there is none."""
        offset, shape = [], []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            low = max(b, a)
            extent = min(a + n, b + m) - low
            if extent <= 0:
                return None
            offset.append(low)
            shape.append(extent)
        return Box(tuple(offset), tuple(shape))

    def relative_to(self, origin: Sequence[int]) -> tuple[int, ...]:
        """Return the offset counted from *origin*."""
        return tuple(a - b for a, b in zip(self.offset, origin, strict=True))


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Return the boxes that make up elements ``start:stop`` of a row-major array, in that order.

    Each box is contiguous in row-major order, and there are at most ``2 * ndim - 1``: per dimension
    one ragged beginning and one ragged end around a middle of whole rows.

    Source: own.
    """
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        return _rows(first, flat_boxes(shape[1:], head, tail))
    boxes: list[Box] = []
    if head:
        boxes += _rows(first, flat_boxes(shape[1:], head, row))
        first += 1
    if first < last:
        boxes.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    if tail:
        boxes += _rows(last, flat_boxes(shape[1:], 0, tail))
    return boxes


def _rows(index: int, boxes: list[Box]) -> list[Box]:
    return [Box((index, *b.offset), (1, *b.shape)) for b in boxes]


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the row-major strides of *shape*, in elements."""
    out = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        out[d] = out[d + 1] * shape[d + 1]
    return tuple(out)


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many elements lie from the first to the last one of a strided block."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def cut(box: Box, stride: tuple[int, ...], *, gap: int, limit: int) -> Iterator[Box]:
    """Split *box* of a stored row-major array so that each part is worth one contiguous read.

    A part's extent in storage has no unwanted run of *gap* or more elements in it, and is at most
    *limit* elements unless it is a single one.

    Args:
        box: Not empty, in the coordinates of the stored array.
        stride: Row-major strides of the stored array, in elements.
        gap: Elements.
        limit: Elements.
    """
    for d, n in enumerate(box.shape):
        if n == 1:
            continue
        inner = extent(box.shape[d + 1 :], stride[d + 1 :])
        if stride[d] - inner >= gap:
            rows = 1
        elif inner + (n - 1) * stride[d] > limit:
            rows = max(1, limit // stride[d])
        else:
            break
        for first in range(0, n, rows):
            offset, shape = list(box.offset), list(box.shape)
            offset[d], shape[d] = box.offset[d] + first, min(rows, n - first)
            yield from cut(Box(tuple(offset), tuple(shape)), stride, gap=gap, limit=limit)
        return
    yield box


def cover_fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """Return what is wrong if *boxes* do not tile an array of *shape* exactly once, else None."""
    held, wanted = sum(b.volume for b in boxes), prod(shape)
    if held == wanted and len(boxes) <= 1:
        return None
    low = np.array([b.offset for b in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
    high = low + np.array([b.shape for b in boxes], dtype=np.int64).reshape(low.shape)
    for i in range(len(boxes) - 1):
        apart = (low[i + 1 :] >= high[i]) | (high[i + 1 :] <= low[i])
        if not apart.any(axis=1).all():
            j = i + 1 + int(np.argmin(apart.any(axis=1)))
            return (
                f"two pieces overlap, at offsets {boxes[i].offset} and {boxes[j].offset}: give all "
                "copies but one a replica_id above 0"
            )
    if held != wanted:
        return f"its pieces hold {held} of {wanted} elements: save all of them together"
    return None
