# SPDX-License-Identifier: Apache-2.0
"""Host memory that grows and stays: private, pinned for CUDA, or shared with a writer process.

It begins at a page, so that a disk can take the bytes straight out of it.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch

from mb_ckpt.errors import CheckpointError
from mb_ckpt.format.local_writer import PAGE


class HostMemory:
    """One run of bytes, zeroed so that padding never carries what was in memory before.

    Args:
        shared: Keep it in an anonymous file that another process can map by its descriptor. The
            kernel frees it when the last process that holds the descriptor ends, however it ends.

    Attributes:
        tensor: The bytes, one-dimensional uint8.
        descriptor: Of the shared memory, -1 if private.

    Raises:
        CheckpointError: If this system has no anonymous files.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.descriptor = -1
        self._registered = False
        self._map: Any = None
        if shared:
            if not hasattr(os, "memfd_create"):
                raise CheckpointError("writer='process' needs Linux: use writer='thread'")
            self.descriptor = os.memfd_create("mb-ckpt")

    def reserve(self, total: int, *, pinned: bool) -> bool:
        """Make room for *total* bytes; return whether the memory is now another one."""
        if self.tensor.numel() >= total and (self._is_pinned() or not pinned):
            return False
        pinned = pinned or self._is_pinned()
        total = max(total, self.tensor.numel())
        self._free()  # first: never two buffers
        if self.descriptor < 0:
            room = torch.zeros(total + PAGE, dtype=torch.uint8, pin_memory=pinned)
            start = -room.data_ptr() % PAGE
            self.tensor = room[start : start + total]
            return True
        if total:
            os.ftruncate(self.descriptor, total)
            self._map = mmap.mmap(self.descriptor, total)
            self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
            self.tensor.zero_()  # brings the pages in, so that the first save is as fast as the next
            if pinned:
                self._register()
        return True

    def close(self) -> None:
        """Give the memory back."""
        self._free()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _is_pinned(self) -> bool:
        return self._registered or self.tensor.is_pinned()

    def _register(self) -> None:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = runtime.cudaHostRegister(self.tensor.data_ptr(), self.tensor.numel(), 0)
        self._registered = int(code) == 0  # else copies still work, only slower

    def _free(self) -> None:
        if self._registered:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(self.tensor.data_ptr())
            self._registered = False
        # The map is unmapped once no tensor or array refers to it any more.
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._map = None
