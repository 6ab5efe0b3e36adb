# SPDX-License-Identifier: Apache-2.0
"""Fill pieces of any layout from a step of any other, in few large reads that go on side by side."""

from __future__ import annotations

import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from attrs import define, field, frozen

from mb_ckpt.errors import CheckpointError, CorruptCheckpointError, storage_error
from mb_ckpt.format.local_writer import is_local
from mb_ckpt.format.packed import ALIGNMENT, INNER_BYTES, open_packed
from mb_ckpt.loading import segments as planning
from mb_ckpt.loading.segments import Segment, bits, segments_of
from mb_ckpt.places.catalogue import step_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from mb_ckpt.format.local_reader import LocalArray
    from mb_ckpt.format.manifest import Manifest
    from mb_ckpt.format.packed import RemoteArray
    from mb_ckpt.interfaces import Store
    from mb_ckpt.states.pieces import Piece

_IN_FLIGHT = 4
_LEAST_DIRECT = 64 << 10
"""Smaller runs of values are cheaper to copy, many in one call, than to read to their places."""
# What tensorstore says of a file that is there, or should be, and does not hold what it should.
_DAMAGED = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")


@define(eq=False)
class Read:
    """Segments of one file that are read together, as the bytes ``start:stop``.

    Attributes:
        file: Index of the file.
        start, stop: Bytes.
        direct: Bytes that go straight to where they belong, ascending: the first, the one after
            the last, and the memory.
        scattered: Segments whose bytes are read into a buffer first.
        segments: All, also those whose bytes are only in part among these.
    """

    file: int
    start: int
    stop: int
    direct: list[tuple[int, int, memoryview]] = field(factory=list)
    scattered: list[Segment] = field(factory=list)
    segments: list[Segment] = field(factory=list)

    @property
    def needs_buffer(self) -> bool:
        """Whether not all bytes go straight to where they belong."""
        return sum(stop - start for start, stop, _ in self.direct) < self.stop - self.start

    def places(self, buffer: memoryview | None) -> list[memoryview]:
        """Return where the bytes go, those that are not direct into *buffer* by their distance."""
        out, at = [], self.start
        for start, stop, memory in (*self.direct, (self.stop, self.stop, None)):
            if start > at:
                assert buffer is not None
                out.append(buffer[at - self.start : start - self.start])
            if memory is not None:
                out.append(memory)
            at = stop
        return out

    def hand_out(self, buffer: Tensor) -> None:
        """Copy what was read into *buffer* to where it belongs, in one call, without the GIL."""
        targets, values = [], []
        for s in self.scattered:
            target = bits(s.target)
            run = buffer[s.start - self.start : s.stop - self.start].view(target.dtype)
            targets.append(target)
            values.append(run.as_strided(target.shape, s.strides, run.storage_offset()))
        if targets:
            torch._foreach_copy_(targets, values)


def listing(names: list[str], most: int = 10) -> str:
    """Return *names* for a message, the first *most* of them and how many more there are."""
    names = list(dict.fromkeys(names))
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def fill(store: Store, manifest: Manifest, pieces: list[Piece], *, alone: bool = False) -> None:
    """Write the stored values of a packed step into the data of *pieces*, which fit it.

    Args:
        store: The place.
        manifest: Of the step.
        pieces: What to fill.
        alone: Whether there is no other rank, which might want the same bytes.

    Raises:
        CorruptCheckpointError: If stored bytes are damaged or missing; names tensor and file.
    """
    segments = [
        segment
        for piece in pieces
        for segment in segments_of(piece, manifest.tensors[piece.spec.key], alone=alone)
    ]
    mixed = is_local(store.kvstore, manifest.compression)
    _Filling(store, manifest).run(list(_reads(segments, mixed=mixed)))


@frozen(eq=False)
class _Pending:
    """A read under way."""

    read: Read
    buffer: Tensor | None
    future: Future[None]


@define(eq=False)
class _Filling:
    """One load going on: open arrays, reads under way and buffers at rest."""

    store: Store
    manifest: Manifest
    arrays: dict[int, LocalArray | RemoteArray] = field(factory=dict)
    buffers: list[Tensor] = field(factory=list)
    pending: deque[_Pending] = field(factory=deque)

    def run(self, reads: list[Read]) -> None:
        """Carry out *reads*, a few at a time."""
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="mb-ckpt-read") as threads:
            for read in reads:
                if len(self.pending) >= _IN_FLIGHT:
                    self._finish()
                self._start(read, threads)
            while self.pending:
                self._finish()

    def _start(self, read: Read, threads: ThreadPoolExecutor) -> None:
        if read.file not in self.arrays:
            self.arrays[read.file] = open_file(self.store, self.manifest, read.file)
        buffer = None
        if read.needs_buffer:
            buffer = self.buffers.pop() if self.buffers else _buffer()
        places = read.places(None if buffer is None else buffer.numpy().data)
        alone = all(segment.alone for segment in read.segments)
        array = self.arrays[read.file]
        future = threads.submit(array.read, read.start, places, past_cache=alone)
        self.pending.append(_Pending(read, buffer, future))

    def _finish(self) -> None:
        """Wait for the oldest read, hand out what it brought and keep its buffer."""
        one = self.pending.popleft()
        try:
            one.future.result()
        except (ValueError, OSError):
            # Again one by one: the message names the tensor, and damage beside them is none.
            for segment in one.read.segments:
                self._read_alone(segment)
        else:
            if one.buffer is not None:
                one.read.hand_out(one.buffer)
        if one.buffer is not None:
            self.buffers.append(one.buffer)

    def _read_alone(self, segment: Segment) -> None:
        first = segment.start - segment.start % ALIGNMENT
        out = torch.empty(segment.stop - first, dtype=torch.uint8)
        try:
            self.arrays[segment.file].read(first, [out.numpy().data])
        except (ValueError, OSError) as e:
            path = f"{self.store.url}/{data_path(self.manifest, segment.file)}"
            raise damage(path, [segment.key], e) from e
        segment.scatter(out[segment.start - first :])


def _buffer() -> Tensor:
    return torch.empty(planning.READ_BYTES + ALIGNMENT, dtype=torch.uint8)


def open_file(store: Store, manifest: Manifest, index: int) -> LocalArray | RemoteArray:
    """Return the packed array of one rank, for reading."""
    return open_packed(store.kvstore, data_path(manifest, index), manifest.files[index].grid)


def data_path(manifest: Manifest, index: int) -> str:
    """Return where a file is, from the root of the store."""
    return f"{step_name(manifest.step)}/{manifest.data}/{manifest.files[index].path}"


def damage(path: str, keys: list[str], error: Exception) -> CheckpointError:
    """Return the error for bytes of the array at *path* that cannot be read.

    Args:
        path: Of the array.
        keys: Tensors with bytes there, to be named.
        error: As tensorstore has it.
    """
    names = f"tensor {listing([repr(key) for key in keys])}" if keys else "no tensor"
    text = str(error)
    if any(status in text for status in _DAMAGED):
        kind = "missing" if "is missing" in text else "corrupt"
        file = re.search(r'(/c(?:/\d+)*)"', text)
        return CorruptCheckpointError(
            f"{path}{file[1] if file else ''} is {kind}, it holds {names}: load another step "
            f"({text.split(' [', maxsplit=1)[0]})"
        )
    return storage_error(f"reading {names} from {path}", error)


def _reads(segments: Iterable[Segment], *, mixed: bool) -> Iterator[Read]:
    """Yield reads in the order of the files, neighbouring segments together.

    Args:
        segments: In any order.
        mixed: Whether a read can go to several places: then it begins and ends, where it can, at
            multiples of 16 MiB, so that no chunk is read twice.
    """
    least = _LEAST_DIRECT if mixed else INNER_BYTES
    reads = _Reads(mixed=mixed)
    for segment in sorted(segments, key=lambda s: (s.file, s.start)):
        memory = segment.direct(least)
        yield from reads.add(segment) if memory is None else reads.add_direct(segment, memory)
    yield from reads.end()


class _Reads:
    """Makes reads of segments that come in the order of the files."""

    def __init__(self, *, mixed: bool) -> None:
        self._mixed = mixed
        self._read: Read | None = None

    def add(self, segment: Segment) -> Iterator[Read]:
        """Take in a segment that goes through a buffer; yield what was read before it."""
        read = self._read
        if read is not None and (
            self._is_far(segment)
            or segment.stop - read.start > planning.READ_BYTES
            # Bytes that have gone straight to another place are in no buffer.
            or (read.direct and segment.start < read.direct[-1][1])
        ):
            yield from self.end()
        read = self._begun(segment.file, segment.start)
        read.stop = max(read.stop, segment.stop)
        read.scattered.append(segment)
        read.segments.append(segment)

    def add_direct(self, segment: Segment, memory: memoryview) -> Iterator[Read]:
        """Take in a segment whose bytes go straight to *memory*; yield what was read before it."""
        if not self._mixed:
            whole = (segment.start, segment.stop, memory)
            yield Read(segment.file, segment.start, segment.stop, [whole], [], [segment])
            return
        if self._read is not None and (self._is_far(segment) or segment.start < self._read.stop):
            yield from self.end()
        at, limit = segment.start, planning.READ_BYTES
        while at < segment.stop:
            read = self._begun(segment.file, at)
            end = (read.start // limit + 1) * limit
            if at >= end:
                yield from self.end()
                continue
            upto = min(segment.stop, end)
            read.direct.append((at, upto, memory[at - segment.start : upto - segment.start]))
            read.segments.append(segment)
            read.stop = at = upto
            if at == end:
                yield from self.end()

    def end(self) -> Iterator[Read]:
        """Yield the read that was being made, if any."""
        if self._read is not None:
            yield self._read
            self._read = None

    def _begun(self, file: int, start: int) -> Read:
        if self._read is None:
            start -= start % ALIGNMENT  # values lie in the buffer as they do in the file
            self._read = Read(file, start, start)
        return self._read

    def _is_far(self, segment: Segment) -> bool:
        read = self._read
        assert read is not None
        return segment.file != read.file or segment.start - read.stop >= INNER_BYTES
