# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a packed step fill which part of which tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from mb_ckpt.errors import CorruptCheckpointError
from mb_ckpt.format.packed import INNER_BYTES
from mb_ckpt.states.boxes import Box, cut, extent, strides

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mb_ckpt.format.manifest import Chunk, TensorEntry
    from mb_ckpt.states.pieces import Piece

READ_BYTES = 16 << 20
"""Most bytes in one segment."""
_MANY_CHUNKS = 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """Return *tensor* seen as integers of the same width, so that a copy keeps every bit pattern.

    complex128, for which there is no such integer, comes back as it is.
    """
    kind = _BITS.get(tensor.element_size())
    return tensor if kind is None else tensor.view(kind)


@frozen(eq=False)
class Segment:
    """One run of bytes in a file, and the part of a tensor that gets values from it.

    Attributes:
        key: Of the tensor.
        file: Index of the file.
        start, stop: Bytes.
        strides: Of the part within the run, in elements.
        target: Where the values go.
        alone: Whether no other process of this machine is likely to want the same bytes.
    """

    key: str
    file: int
    start: int
    stop: int
    strides: tuple[int, ...]
    target: Tensor
    alone: bool = False

    def direct(self, least: int) -> memoryview | None:
        """Return the target's memory if the run, of *least* bytes or more, is just its values."""
        if self.stop - self.start < least or self.target.device.type != "cpu":
            return None
        if self.strides != strides(tuple(self.target.shape)) or not self.target.is_contiguous():
            return None
        return self.target.view(-1).view(torch.uint8).numpy().data

    def scatter(self, run: Tensor) -> None:
        """Copy the values from *run*, the bytes ``start:stop``."""
        target = bits(self.target)
        values = run.view(target.dtype)
        target.copy_(values.as_strided(target.shape, self.strides, values.storage_offset()))


def segments_of(piece: Piece, entry: TensorEntry, *, alone: bool = False) -> Iterator[Segment]:
    """Yield the runs of bytes that together fill *piece*.

    Args:
        piece: What to fill.
        entry: What the step says of its tensor.
        alone: Whether there is no other rank.
    """
    alone = alone or piece.spec.unique
    key, width = piece.spec.key, piece.data.element_size()
    gap, limit = INNER_BYTES // width, READ_BYTES // width
    for box, view in piece.views():
        if len(entry.chunks) == 1 and view.numel() <= limit:
            file, first, offset, shape = entry.chunks[0]
            if (offset, shape) == (box.offset, box.shape):  # nearly always: spared the algebra
                stop = first + view.numel() * width
                yield Segment(key, file, first, stop, strides(shape), view, alone)
                continue
        found = 0
        for chunk in _near(box, entry.chunks):
            file, first, offset, shape = chunk
            common = box.intersect(Box(offset, shape))
            if common is None:
                continue
            found += common.volume
            stride = strides(shape)
            for part in cut(
                Box(common.relative_to(offset), common.shape), stride, gap=gap, limit=limit
            ):
                skipped = sum(o * s for o, s in zip(part.offset, stride, strict=True))
                start = first + skipped * width
                here = tuple(
                    p + o - b for p, o, b in zip(part.offset, offset, box.offset, strict=True)
                )
                yield Segment(
                    key=key,
                    file=file,
                    start=start,
                    stop=start + extent(part.shape, stride) * width,
                    strides=stride,
                    target=_narrow(view, Box(here, part.shape)),
                    alone=alone,
                )
        if found != box.volume:
            raise CorruptCheckpointError(
                f"tensor {key!r}: the manifest holds {found} of the {box.volume} elements at "
                f"{box.offset}: load another step"
            )


def _near(box: Box, chunks: tuple[Chunk, ...]) -> Iterable[Chunk]:
    """Return the chunks that may meet *box*."""
    if len(chunks) < _MANY_CHUNKS or not box.shape:
        return chunks
    low = np.array([offset for _, _, offset, _ in chunks])
    high = low + np.array([shape for _, _, _, shape in chunks])
    start = np.array(box.offset)
    meets = ((low < start + np.array(box.shape)) & (high > start)).all(axis=1)
    return [chunks[i] for i in np.flatnonzero(meets)]


def _narrow(view: Tensor, box: Box) -> Tensor:
    if tuple(view.shape) == box.shape:
        return view
    return view[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
