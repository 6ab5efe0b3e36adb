# SPDX-License-Identifier: Apache-2.0
"""The shard files of an uncompressed packed array on a local disk, read straight into their targets.

Every chunk that is touched is read as a whole and checked against its crc32c; that the bytes between
chunks are zeros is checked as well, so that no bit of a file can flip unnoticed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from attrs import define, field, frozen
from crc32c import crc32c

from mb_ckpt.format.local_writer import (
    ABSENT,
    CRC_BYTES,
    DIRECT,
    MOST_BUFFERS,
    PAGE,
    index_bytes,
    page_aligned,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mb_ckpt.format.packed import Grid
    from mb_ckpt.format.tensorstore_io import Bytes

_LARGEST_GAP = 2 * PAGE
_MOST_CHUNKS = 8
"""In one call: checked while they are still in the processor's cache."""
_ZEROS = bytes(_LARGEST_GAP)
_LIBC = ctypes.CDLL(None)


class DamagedChunkError(ValueError):
    """Bytes of a file are missing or not what was written; says which, in tensorstore's words."""


@frozen
class _Chunk:
    """Where an encoded chunk is, and how many zeros follow it."""

    offset: int
    gap: int


@define
class LocalArray:
    """The files of one array, open for reading from several threads.

    Attributes:
        folder: Of the array.
        grid: Without compression.
    """

    folder: Path
    grid: Grid
    _indices: dict[int, _Index] = field(factory=dict, init=False)
    _buffers: list[Bytes] = field(factory=list, init=False)

    def read(self, start: int, buffers: Sequence[memoryview], *, past_cache: bool = False) -> None:
        """Fill *buffers*, one after the other, with the bytes of the array from *start* on.

        Args:
            start: First byte.
            buffers: Where to.
            past_cache: Whether to read past the page cache what is not in it: faster, unless other
                processes of this machine want the same bytes.

        Raises:
            DamagedChunkError: If bytes are missing or damaged; names the file.
            OSError: If the storage refuses.
        """
        supply = _Supply(buffers)
        stop = start + supply.left
        for shard in range(start // self.grid.shard, -(-stop // self.grid.shard)):
            base = shard * self.grid.shard
            low, high = max(start, base) - base, min(stop, base + self.grid.shard) - base
            path = f"{self.folder}/c/{shard}"
            with ExitStack() as stack:
                file = _opened(path, os.O_RDONLY, stack)
                index = self._indices.get(shard)
                if index is None:
                    index = self._indices[shard] = _read_index(file, path, self.grid)
                run: _Run = _Run(file, path)
                if past_cache and not index.is_cached:
                    with suppress(OSError):  # not every disk can
                        direct = _opened(path, os.O_RDONLY | DIRECT, stack)
                        run = _DirectRun(direct, path, self._buffer(stack))
                self._read_chunks(run, index.chunks, low, high, supply)

    def _buffer(self, stack: ExitStack) -> Bytes:
        """Return a buffer for one run, which *stack* gives back."""
        size = _MOST_CHUNKS * (self.grid.inner + _LARGEST_GAP + PAGE)
        buffer = self._buffers.pop() if self._buffers else page_aligned(size)
        stack.callback(self._buffers.append, buffer)
        return buffer

    def _read_chunks(
        self, run: _Run, chunks: list[_Chunk | None], low: int, high: int, supply: _Supply
    ) -> None:
        """Read the bytes ``low:high`` of a file's part of the array."""
        inner = self.grid.inner
        for number in range(low // inner, -(-high // inner)):
            chunk = chunks[number]
            if chunk is None:
                raise run.damaged(f"chunk {number} is missing", "NOT_FOUND")
            if not run.is_followed_by(chunk):
                run.read()
            begin = number * inner
            before = max(0, low - begin)
            wanted = min(high - begin, inner) - before
            after = inner - before - wanted
            run.add(number, chunk, [*_scratch(before), *supply.take(wanted), *_scratch(after)])
        run.read()


def _opened(path: str, flags: int, stack: ExitStack) -> int:
    try:
        file = os.open(path, flags)
    except FileNotFoundError:
        raise DamagedChunkError(f'NOT_FOUND: chunk is missing: "{path}"') from None
    stack.callback(os.close, file)
    return file


class _Supply:
    """Buffers, handed out piece by piece."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = list(buffers)
        self._buffers.reverse()
        self.left = sum(map(len, buffers))

    def take(self, count: int) -> Iterator[memoryview]:
        """Yield the next *count* bytes."""
        self.left -= count
        while count:
            buffer = self._buffers.pop()
            if len(buffer) > count:
                self._buffers.append(buffer[count:])
                buffer = buffer[:count]
            count -= len(buffer)
            yield buffer


def _scratch(count: int) -> list[memoryview]:
    return [memoryview(bytearray(count))] if count else []


class _Run:
    """Chunks that lie one after the other in a file, read in one call and then checked."""

    def __init__(self, file: int, path: str) -> None:
        self._file = file
        self._path = path
        self._start = self._end = 0
        self._chunks: list[tuple[int, list[memoryview], bytearray]] = []

    def is_followed_by(self, chunk: _Chunk) -> bool:
        """Return whether *chunk* is where this ends, and there is room for it."""
        return chunk.offset == self._end and len(self._chunks) < _MOST_CHUNKS

    def add(self, number: int, chunk: _Chunk, parts: list[memoryview]) -> None:
        """Read *chunk* into *parts*, too."""
        if not self._chunks:
            self._start = self._end = chunk.offset
        tail = bytearray(CRC_BYTES + chunk.gap)
        self._chunks.append((number, parts, tail))
        self._end += sum(map(len, parts)) + len(tail)

    def read(self) -> None:
        """Read all that was added and begin anew."""
        self._fill([b for _, parts, tail in self._chunks for b in (*parts, memoryview(tail))])
        for number, parts, tail in self._chunks:
            self._check(number, parts, bytes(tail))
        self._chunks = []

    def _check(self, number: int, parts: list[memoryview], tail: bytes) -> None:
        crc = 0
        for part in parts:
            crc = crc32c(part, crc)
        if crc != int.from_bytes(tail[:CRC_BYTES], "little"):
            raise self.damaged(f"crc32c of chunk {number} does not match")
        if tail[CRC_BYTES:] != _ZEROS[: len(tail) - CRC_BYTES]:
            raise self.damaged(f"bytes after chunk {number} are not zero")

    def _fill(self, left: list[memoryview]) -> None:
        at, first = self._start, 0
        while first < len(left):
            done = os.preadv(self._file, left[first : first + MOST_BUFFERS], at)
            if not done:
                raise self.damaged(f"the file ends at byte {at}")
            at += done
            while first < len(left) and done >= len(left[first]):
                done -= len(left[first])
                first += 1
            if done:
                left[first] = left[first][done:]

    def damaged(self, what: str, status: str = "DATA_LOSS") -> DamagedChunkError:
        """Return the error for *what* is wrong with the file."""
        return DamagedChunkError(f'{status}: {what}: "{self._path}"')


class _DirectRun(_Run):
    """The same past the page cache: into a buffer that begins at a page, and from there on."""

    def __init__(self, file: int, path: str, buffer: Bytes) -> None:
        super().__init__(file, path)
        self._buffer = buffer

    def read(self) -> None:
        """Read all that was added and begin anew."""
        first = self._start - self._start % PAGE
        length = -(-(self._end - first) // PAGE) * PAGE
        self._fill_direct(first, self._end - first, length)
        at = self._start - first
        for number, parts, tail in self._chunks:
            begin, at = at, at + sum(map(len, parts))
            chunk = self._buffer[begin:at]
            self._check(number, [chunk.data], self._buffer[at : at + len(tail)].tobytes())
            for part in parts:  # numpy copies without the GIL
                np.copyto(np.frombuffer(part, np.uint8), self._buffer[begin : begin + len(part)])
                begin += len(part)
            at += len(tail)
        self._chunks = []

    def _fill_direct(self, first: int, needed: int, length: int) -> None:
        done = 0
        while done < needed:
            count = os.preadv(self._file, [self._buffer[done:length].data], first + done)
            if not count:
                raise self.damaged(f"the file ends at byte {first + done}")
            done += count
            if done < needed and done % PAGE:  # the end of the file, or a disk that is odd
                done -= done % PAGE
                if count < PAGE:
                    raise self.damaged(f"the file ends at byte {first + done + count}")


@frozen
class _Index:
    """What is known of a file.

    Attributes:
        chunks: Where they are, None for those that it lacks.
        is_cached: Whether most of it was in the page cache when it was opened.
    """

    chunks: list[_Chunk | None]
    is_cached: bool


def _read_index(file: int, path: str, grid: Grid) -> _Index:
    length, size = index_bytes(grid), os.fstat(file).st_size
    is_cached = _is_cached(file, size)
    raw = os.pread(file, length, max(0, size - length))
    crc = int.from_bytes(raw[-CRC_BYTES:], "little")
    if len(raw) != length or crc32c(raw[:-CRC_BYTES]) != crc:
        raise DamagedChunkError(f'DATA_LOSS: the index is damaged or cut short: "{path}"')
    entries = np.frombuffer(raw[:-CRC_BYTES], "<u8").reshape(-1, 2).tolist()
    present = sorted((offset, n) for n, (offset, _) in enumerate(entries) if offset != ABSENT)
    chunks: list[_Chunk | None] = [None] * len(entries)
    if present and present[0][0]:
        raise DamagedChunkError(f'DATA_LOSS: the file does not begin with a chunk: "{path}"')
    for (offset, number), (following, _) in pairwise([*present, (size - length, -1)]):
        gap = following - offset - grid.inner - CRC_BYTES
        if entries[number][1] != grid.inner + CRC_BYTES or not 0 <= gap <= _LARGEST_GAP:
            raise DamagedChunkError(f'DATA_LOSS: the index makes no sense: "{path}"')
        chunks[number] = _Chunk(offset, gap)
    return _Index(chunks, is_cached)


def _is_cached(file: int, size: int) -> bool:
    """Return whether most of a file is in the page cache; True where nobody can tell."""
    if not size or not hasattr(_LIBC, "mincore"):
        return True
    try:
        view = mmap.mmap(file, size, prot=mmap.PROT_READ)
    except OSError:  # some network file systems map nothing
        return True
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    address = ctypes.c_void_p(np.frombuffer(view, np.uint8).ctypes.data)
    failed = _LIBC.mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
    return bool(failed) or 2 * int((pages & 1).sum()) > len(pages)
