# SPDX-License-Identifier: Apache-2.0
"""The blocking half of a save: tensors copied into one reused host buffer.

The buffer is kept between saves: a copy into pages that are already there is some ten times faster
than one into fresh pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_ckpt.state import Piece
    from mb_ckpt.tensorstore_io import Bytes

ALIGNMENT = 16
"""Every piece begins at a multiple of this many bytes: the widest dtype, complex128."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return *tensor* seen as integers of the same width, so that a copy keeps every bit pattern.

    complex128, for which there is no such integer, comes back as it is.
    """
    kind = _BITS.get(tensor.element_size())
    return tensor if kind is None else tensor.view(kind)


def pack(pieces: Sequence[Piece]) -> tuple[list[int], int]:
    """Return where each piece begins in one run of bytes, and the length of it."""
    starts, end = [], 0
    for piece in pieces:
        starts.append(end)
        end += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


_Place = tuple[int, torch.dtype, torch.Size]


@frozen(eq=False)
class Snapshot:
    """Staged values: nobody but the writer touches them until the buffer is staged into again."""

    data: Bytes
    event: Any = None

    def wait(self) -> None:
        """Return when copies from the device are done."""
        if self.event is not None:
            self.event.synchronize()


class HostBuffer:
    """Host memory that grows to the largest save and stays; pinned once CUDA tensors come."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._places: list[_Place] = []
        self._views: list[torch.Tensor] = []

    def stage(self, pieces: Sequence[Piece], starts: Sequence[int], total: int) -> Snapshot:
        """Copy *pieces* to *starts*.

        Copies from CUDA are queued on the current stream: what is queued on it later, such as the
        next optimizer step, finds them done.
        """
        on_cuda = any(piece.data.is_cuda for piece in pieces)
        self._reserve(total, pinned=on_cuda)
        sources = [bits(piece.data) for piece in pieces]
        places = [(at, s.dtype, s.shape) for at, s in zip(starts, sources, strict=True)]
        if places != self._places:
            self._views = [self._view(place) for place in places]
            self._places = places
        for view, source in zip(self._views, sources, strict=True):
            view.copy_(source, non_blocking=True)
        event = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        return Snapshot(self._memory[:total].numpy(), event)

    def _view(self, place: _Place) -> torch.Tensor:
        start, dtype, shape = place
        nbytes = shape.numel() * dtype.itemsize
        return self._memory[start : start + nbytes].view(dtype).view(shape)

    def _reserve(self, total: int, *, pinned: bool) -> None:
        if self._memory.numel() < total or (pinned and not self._memory.is_pinned()):
            self._places, self._views = [], []
            self._memory = torch.empty(0, dtype=torch.uint8)  # freed first: never two buffers
            # Zeroed so that padding never carries what was in memory before.
            self._memory = torch.zeros(total, dtype=torch.uint8, pin_memory=pinned)
