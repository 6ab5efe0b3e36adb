# SPDX-License-Identifier: Apache-2.0
"""Tensors copied into one reused host buffer, at once or behind the next forward and backward.

The buffer is kept between saves: a copy into pages that are already there is some ten times faster
than one into fresh pages.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch

from mb_ckpt.format.local_writer import processors
from mb_ckpt.saving.on_demand import BytesOnDemand

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mb_ckpt.format.tensorstore_io import Bytes
    from mb_ckpt.saving.host_memory import HostMemory
    from mb_ckpt.saving.planning import Share
    from mb_ckpt.states.storable import Rows

_LEAST_BYTES = 16 << 20
"""Less is not worth a thread."""
_MOST_THREADS = 4


class Snapshot:
    """Staged values: nobody but the writer touches them until the buffer is staged into again."""

    def __init__(self, data: Bytes | BytesOnDemand, event: Any = None) -> None:
        self.data = data
        self._event = event

    def wait(self) -> None:
        """Return when copies from the device are done."""
        if self._event is not None:
            self._event.synchronize()


class Fence:
    """What stands between a lazy copy and the next change of the tensors."""

    def __init__(self) -> None:
        self._begun = threading.Event()
        self._event: Any = None

    def open(self, event: Any = None) -> None:
        """Say that all copies are done or, with *event*, queued before it."""
        self._event = event
        self._begun.set()

    def wait(self) -> None:
        """Return when the tensors may change.

        With CUDA that is said to the current stream: what is queued on it from now on runs after
        the copies, and the host goes on.
        """
        self._begun.wait()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class HostBuffer:
    """Copies a rank's share of a state into host memory that grows to the largest save.

    Args:
        memory: Where to.
    """

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._share: Share | None = None
        self._views: list[torch.Tensor] = []
        self._stream: Any = None

    def stage(
        self,
        share: Share,
        tensors: list[torch.Tensor],
        *,
        ready: Any = None,
        readers: Mapping[int, Rows] | None = None,
    ) -> tuple[Snapshot, Any]:
        """Copy what *share* says out of *tensors*.

        Args:
            share: What to copy.
            tensors: All of this rank's pieces.
            ready: A CUDA event after which the values may be read. With it copies from CUDA run on a
                stream of their own, else on the current stream, where what is queued later finds
                them done.
            readers: By index of the piece, what reads values that are not here. If there are any,
                nothing is copied: all values are read when they are written.

        Returns:
            The copy, and the CUDA event that follows it, None without CUDA.
        """
        if readers:
            return Snapshot(BytesOnDemand(share, tensors, readers)), None
        sources = tensors
        if not share.is_all:
            sources = [
                tensors[part.index] if part.rows is None else tensors[part.index].narrow(*part.rows)
                for part in share.parts
            ]
        cuda = next((s.device for s in sources if s.is_cuda), None)
        if self._memory.reserve(share.total, pinned=cuda is not None) or share is not self._share:
            self._views = _views(self._memory.tensor, share, sources)
            self._share = share
        event = None
        if cuda is None:
            _copy_on_threads(self._views, sources)
        else:
            event = self._copy_from_cuda(sources, cuda, ready)
        return Snapshot(self._memory.tensor[: share.total].numpy(), event), event

    def _copy_from_cuda(self, sources: list[torch.Tensor], device: Any, ready: Any) -> Any:
        if ready is None:
            stream = torch.cuda.current_stream(device)
        else:
            self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._stream
            stream.wait_event(ready)
        with torch.cuda.stream(stream):
            _copy(self._views, sources)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return event

    def close(self) -> None:
        """Give the memory back."""
        self._share, self._views = None, []
        self._memory.close()


def _copy(views: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy all in one call that lets other Python threads run meanwhile."""
    if views:
        with torch.no_grad():
            torch._foreach_copy_(views, sources, non_blocking=True)


def _copy_on_threads(views: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy all within host memory: one thread cannot use all that the memory can move."""
    ends = list(accumulate(view.nbytes for view in views))
    total = ends[-1] if ends else 0
    count = min(total // _LEAST_BYTES, _MOST_THREADS, processors())
    if count <= 1:
        _copy(views, sources)
        return
    cuts = [bisect_left(ends, total * k // count) for k in range(count)] + [len(views)]
    with ThreadPoolExecutor(count, thread_name_prefix="mb-ckpt-copy") as threads:
        copies = [threads.submit(_copy, views[a:b], sources[a:b]) for a, b in pairwise(cuts)]
        for copy in copies:
            copy.result()


def _views(
    memory: torch.Tensor, share: Share, sources: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the places in *memory* with the shapes and dtypes of *sources*."""
    views = []
    for part, source in zip(share.parts, sources, strict=True):
        nbytes = source.numel() * source.element_size()
        place = memory[part.start : part.start + nbytes].view(source.dtype)
        views.append(place.view(source.shape))
    return views
