# SPDX-License-Identifier: Apache-2.0
"""Fill pieces of any layout from a step of any other: which bytes to read, then reading them."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import define, field, frozen
from torch import Tensor

from mb_ckpt.errors import CheckpointError, CorruptCheckpointError, storage_error
from mb_ckpt.format.packed import ALIGNMENT, INNER_BYTES, array_metadata, open_array
from mb_ckpt.format.tensorstore_io import start_read
from mb_ckpt.places.catalogue import step_name
from mb_ckpt.states.boxes import Box, cut, extent, strides

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mb_ckpt.format.manifest import Chunk, Manifest, TensorEntry
    from mb_ckpt.interfaces import Store
    from mb_ckpt.states.pieces import Piece

READ_BYTES = 16 << 20
"""Most bytes in one read; up to `_IN_FLIGHT` reads are under way at a time."""
_IN_FLIGHT = 4
_MANY_CHUNKS = 16
# What tensorstore says of a file that is there, or should be, and does not hold what it should.
_DAMAGED = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT")


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
    """

    key: str
    file: int
    start: int
    stop: int
    strides: tuple[int, ...]
    target: Tensor

    def direct(self) -> Tensor | None:
        """Return the target as bytes if the run can be read straight into it."""
        dense = self.strides == strides(tuple(self.target.shape))
        wide = self.stop - self.start >= INNER_BYTES
        if wide and dense and self.target.is_contiguous() and self.target.device.type == "cpu":
            return self.target.view(-1).view(torch.uint8)
        return None

    def scatter(self, run: Tensor) -> None:
        """Copy the values from *run*, the bytes ``start:stop``."""
        target = bits(self.target)
        values = run.view(target.dtype)
        target.copy_(values.as_strided(target.shape, self.strides, values.storage_offset()))


@frozen(eq=False)
class Read:
    """Segments of one file that are read together, as the bytes ``start:stop``."""

    file: int
    start: int
    stop: int
    segments: list[Segment]


def listing(names: list[str], most: int = 10) -> str:
    """Return *names* for a message, the first *most* of them and how many more there are."""
    names = list(dict.fromkeys(names))
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def fill(store: Store, manifest: Manifest, pieces: list[Piece]) -> None:
    """Write the stored values of a packed step into the data of *pieces*, which fit it.

    Raises:
        CorruptCheckpointError: If stored bytes are damaged or missing; names tensor and file.
    """
    segments = [s for piece in pieces for s in _segments(piece, manifest.tensors[piece.spec.key])]
    _Filling(store, manifest).run(_reads(segments))


def _buffer() -> Tensor:
    return torch.empty(READ_BYTES + ALIGNMENT, dtype=torch.uint8)


@define(eq=False)
class _Filling:
    """One load going on: open arrays, reads under way and buffers at rest."""

    store: Store
    manifest: Manifest
    arrays: dict[int, Any] = field(factory=dict)
    buffers: list[Tensor] = field(factory=list)
    pending: deque[tuple[Read, Any, Tensor | None]] = field(factory=deque)

    def run(self, reads: Iterable[Read]) -> None:
        """Carry out *reads*, a few at a time."""
        try:
            for read in reads:
                if len(self.pending) >= _IN_FLIGHT:
                    self._finish()
                self._start(read)
            while self.pending:
                self._finish()
        finally:
            for _, future, _ in self.pending:  # they write into memory about to be freed
                future.exception()

    def _start(self, read: Read) -> None:
        if read.file not in self.arrays:
            self.arrays[read.file] = open_file(self.store, self.manifest, read.file)
        out = read.segments[0].direct() if len(read.segments) == 1 else None
        buffer = None
        if out is None:
            buffer = self.buffers.pop() if self.buffers else _buffer()
            out = buffer[: read.stop - read.start]
        future = start_read(self.arrays[read.file], slice(read.start, read.stop), out.numpy())
        self.pending.append((read, future, buffer))

    def _finish(self) -> None:
        """Wait for the oldest read, hand out what it brought and keep its buffer."""
        read, future, buffer = self.pending.popleft()
        try:
            future.result()
        except (ValueError, OSError):
            # Again one by one: the message names the tensor, and damage beside them is none.
            for segment in read.segments:
                self._read_alone(segment)
        else:
            if buffer is not None:
                _hand_out(read, buffer)
        if buffer is not None:
            self.buffers.append(buffer)

    def _read_alone(self, segment: Segment) -> None:
        first = segment.start - segment.start % ALIGNMENT
        out = torch.empty(segment.stop - first, dtype=torch.uint8)
        try:
            where = slice(first, segment.stop)
            start_read(self.arrays[segment.file], where, out.numpy()).result()
        except (ValueError, OSError) as e:
            path = f"{self.store.url}/{data_path(self.manifest, segment.file)}"
            raise damage(path, [segment.key], e) from e
        segment.scatter(out[segment.start - first :])


def _hand_out(read: Read, buffer: Tensor) -> None:
    """Copy what *read* brought to where it belongs, all in one call that frees the interpreter."""
    targets, values = [], []
    for s in read.segments:
        target = bits(s.target)
        run = buffer[s.start - read.start : s.stop - read.start].view(target.dtype)
        targets.append(target)
        values.append(run.as_strided(target.shape, s.strides, run.storage_offset()))
    torch._foreach_copy_(targets, values)


def open_file(store: Store, manifest: Manifest, index: int) -> Any:
    """Return the packed array of one rank, as tensorstore opens it."""
    metadata = array_metadata(manifest.files[index].grid)
    return open_array(store.kvstore, data_path(manifest, index), metadata)


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


def _segments(piece: Piece, entry: TensorEntry) -> Iterator[Segment]:
    """Yield the runs of bytes that together fill *piece*."""
    key, width = piece.spec.key, piece.data.element_size()
    gap, limit = INNER_BYTES // width, READ_BYTES // width
    for box, view in piece.views():
        if len(entry.chunks) == 1 and view.numel() <= limit:
            file, first, offset, shape = entry.chunks[0]
            if (offset, shape) == (box.offset, box.shape):  # nearly always: spared the algebra
                stop = first + view.numel() * width
                yield Segment(key, file, first, stop, strides(shape), view)
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


def _reads(segments: list[Segment]) -> Iterator[Read]:
    """Yield reads in the order of the files, neighbouring segments together."""
    together: list[Segment] = []
    file = start = stop = 0
    for segment in sorted(segments, key=lambda s: (s.file, s.start)):
        if segment.direct() is not None:
            yield Read(segment.file, segment.start, segment.stop, [segment])
            continue
        far = segment.file != file or segment.start - stop >= INNER_BYTES
        if together and (far or segment.stop - start > READ_BYTES):
            yield Read(file, start, stop, together)
            together = []
        if not together:
            file, start, stop = segment.file, segment.start - segment.start % ALIGNMENT, 0
        together.append(segment)
        stop = max(stop, segment.stop)
    if together:
        yield Read(file, start, stop, together)
