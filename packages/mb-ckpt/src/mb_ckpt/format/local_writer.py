# SPDX-License-Identifier: Apache-2.0
"""The shard files of an uncompressed packed array on a local disk, written without copies.

They are what zarr's ``sharding_indexed`` codec says: encoded chunks, here a chunk's bytes and their
crc32c, and at the end of the file the index, ``(offset, nbytes)`` of every chunk and a crc32c, all
little-endian. Between them lie zeros, so that every chunk begins at a page: then the disk takes the
bytes straight out of the memory they were staged into (``O_DIRECT``), past the page cache.

Source: zarr v3 specification, sharding codec; tensorstore reads and writes the same files.
"""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mb_ckpt.format.packed import Grid
    from mb_ckpt.format.tensorstore_io import Bytes
    from mb_ckpt.saving.on_demand import BytesOnDemand

PAGE = 4096
CRC_BYTES = 4
THREADS = 4
"""Most files at a time: what it takes to keep a disk busy."""
_BATCH_BYTES = 16 << 20
DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSALS = (errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP)
ABSENT = 2**64 - 1
MOST_BUFFERS = 512
"""In one call, of the 1,024 that Linux takes."""


def is_local(kvstore: Any, compression: int | None) -> bool:
    """Return whether arrays in *kvstore* are written and read by this module."""
    return kvstore["driver"] == "file" and compression is None and hasattr(os, "pwritev")


def index_bytes(grid: Grid) -> int:
    """Return the length of the index of each file, with its checksum."""
    return 16 * (grid.shard // grid.inner) + CRC_BYTES


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def page_aligned(nbytes: int) -> Bytes:
    """Return fresh memory of *nbytes*, zeroed, that begins at a page."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def write_shards(
    folder: Path, data: Bytes | BytesOnDemand, grid: Grid, *, direct: bool = True
) -> None:
    """Write *data* (1-D, not empty) as the files of the array in *folder*; durable on return.

    Args:
        folder: Of the array; its ``c`` must not exist.
        data: Written without a copy where it begins at a page.
        grid: Without compression.
        direct: Whether to go past the page cache where the system lets us. False where the files
            are about to be read again.

    Raises:
        OSError: If the storage refuses.
    """
    chunks = folder / "c"
    chunks.mkdir(parents=True)
    aligned = isinstance(data, np.ndarray) and data.ctypes.data % PAGE == 0
    direct = direct and aligned and len(data) > grid.inner

    def write(start: int) -> None:
        _write_shard(f"{chunks}/{start // grid.shard}", data, start, grid, direct=direct)

    starts = range(0, len(data), grid.shard)
    if len(starts) == 1 or not isinstance(data, np.ndarray):  # what is read on demand, in order
        for start in starts:
            write(start)
    else:
        count = min(THREADS, processors(), len(starts))
        with ThreadPoolExecutor(count, thread_name_prefix="mb-ckpt-write") as threads:
            for _ in threads.map(write, starts):
                pass
    handle = os.open(chunks, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_shard(
    path: str, data: Bytes | BytesOnDemand, start: int, grid: Grid, *, direct: bool
) -> None:
    stop = min(start + grid.shard, len(data))
    count = -(-(stop - start) // grid.inner)
    # Small arrays are one chunk and read as a whole: nothing is won by pages of zeros.
    gap = PAGE - CRC_BYTES if len(data) > grid.inner else 0
    index = np.full(2 * (grid.shard // grid.inner), ABSENT, "<u8")
    step = max(1, _BATCH_BYTES // grid.inner) * grid.inner
    with _Output(path, direct=direct) as output:
        for low in range(start, stop, step):
            part = data[low : min(low + step, stop)].data
            tails = _Pages(-(-len(part) // grid.inner), CRC_BYTES + gap)
            buffers: list[Any] = []
            for begin in range(0, len(part), grid.inner):
                chunk = part[begin : begin + grid.inner]
                if len(chunk) < grid.inner:  # chunks are all of one size
                    chunk = _padded(chunk, grid.inner)
                tail = tails.take(crc32c(chunk).to_bytes(CRC_BYTES, "little"))
                buffers += (chunk, tail)
            output.write(buffers)
        index[: 2 * count : 2] = np.arange(count) * (grid.inner + CRC_BYTES + gap)
        index[1 : 2 * count : 2] = grid.inner + CRC_BYTES
        encoded = index.tobytes()
        encoded += crc32c(encoded).to_bytes(CRC_BYTES, "little")
        if gap:
            length = -(-len(encoded) // PAGE) * PAGE
            output.write([_Pages(1, length).take(encoded, at=length - len(encoded))])
        else:
            output.write([encoded])


class _Pages:
    """Zeroed memory that begins at a page, handed out in places of one *size*."""

    def __init__(self, count: int, size: int) -> None:
        self._size = size
        self._taken = 0
        self._memory = memoryview(mmap.mmap(-1, count * size))

    def take(self, content: bytes, *, at: int = 0) -> memoryview:
        """Return the next place, with *content* from its byte *at* on."""
        place = self._memory[self._taken : self._taken + self._size]
        place[at : at + len(content)] = content
        self._taken += self._size
        return place


def _padded(chunk: memoryview, size: int) -> memoryview:
    place = memoryview(mmap.mmap(-1, size))
    place[: len(chunk)] = chunk
    return place


class _Output:
    """A new file, written from its beginning on and synced at the end."""

    def __init__(self, path: str, *, direct: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._direct = direct and DIRECT > 0
        try:
            self._file = os.open(path, flags | (DIRECT if self._direct else 0), 0o666)
        except OSError as e:
            if not self._direct or e.errno not in _REFUSALS:
                raise
            # Some systems make the file before they refuse to open it so.
            self._file = os.open(path, (flags & ~os.O_EXCL) | os.O_TRUNC, 0o666)
            self._direct = False
        self._end = 0

    def write(self, buffers: Sequence[Any]) -> None:
        """Write *buffers* one after the other."""
        left = [memoryview(buffer) for buffer in buffers]
        while left:
            try:
                done = os.pwritev(self._file, left[:MOST_BUFFERS], self._end)
            except OSError as e:
                if not self._direct or e.errno not in _REFUSALS:
                    raise
                self._through_cache()
                continue
            if not done:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._end += done
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if done:
                left[0] = left[0][done:]
                if self._direct and self._end % PAGE:
                    self._through_cache()

    def _through_cache(self) -> None:
        import fcntl

        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~DIRECT)
        self._direct = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file)
        finally:
            os.close(self._file)
