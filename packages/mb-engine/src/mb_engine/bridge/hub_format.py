# SPDX-License-Identifier: Apache-2.0
"""Tensors in safetensors files, read and written a block at a time.

A file is 8 bytes with the length of the header (little endian), the header in JSON
(``{name: {"dtype", "shape", "data_offsets"}}``, and text under ``__metadata__``) and the values,
row-major and without gaps. A model in several files has ``model.safetensors.index.json`` beside
them, whose ``weight_map`` names the file of each tensor.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from attrs import field, frozen

from mb_engine.bridge.errors import HubFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK_BYTES = 32 << 20
"""Most bytes that one read brings into memory at a time."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in the format."""

LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100 << 20  # the limit of the format


@frozen(kw_only=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        name: Of the tensor.
        dtype: Key of :data:`DTYPES`.
        shape: Its extents.
        file: Path of its file.
        start: First byte of the values in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@frozen
class HubTensors:
    """The tensors of a folder by name, in the order of the files.

    Attributes:
        folder: Where they are.
        entries: Where each lies.
        metadata: The text in the header of each file, by the file's name.
    """

    folder: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Mapping[str, str]] = field(factory=dict)

    def read_rows(
        self, name: str, start: int, stop: int, *, index: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks of rows, at most :data:`BLOCK_BYTES` each unless one row is more.

        Args:
            name: Of the tensor.
            start: First row, along its first dimension; along its second with *index*.
            stop: After the last row.
            index: Which of the matrices of a tensor of three dimensions, or None.

        Yields:
            The number of the first row, and the rows, in the dtype of the file.

        Raises:
            HubFormatError: If the file ends too early.
        """
        entry = self.entries[name]
        shape = entry.shape if index is None else entry.shape[1:]
        dtype = DTYPES[entry.dtype]
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        begin = entry.start + (0 if index is None else index * shape[0] * row_bytes)
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        with entry.file.open("rb") as file:
            for first in range(start, stop, step):
                rows = min(step, stop - first)
                file.seek(begin + first * row_bytes)
                data = bytearray(rows * row_bytes)
                if file.readinto(data) != len(data):
                    raise HubFormatError(f"{entry.file}: it ends within {name!r}; get it anew")
                yield first, _values(data, dtype).view(rows, *shape[1:])

    def read_into(self, name: str, start: int, rows: Tensor, *, index: int | None = None) -> None:
        """Read rows straight into where they belong.

        Args:
            name: Of the tensor.
            start: First row, as in :meth:`read_rows`.
            rows: Contiguous, on the CPU, in the dtype of the file and as wide as its rows.
            index: As in :meth:`read_rows`.

        Raises:
            HubFormatError: If the file ends too early.
        """
        entry = self.entries[name]
        row_bytes = rows[0].nbytes
        first = start if index is None else index * entry.shape[1] + start
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start + first * row_bytes)
            place = bytes_of(rows)
            while place:
                count = file.readinto(place)
                if not count:
                    raise HubFormatError(f"{entry.file}: it ends within {name!r}; get it anew")
                place = place[count:]

    def read(self, name: str) -> Tensor:
        """Return a whole tensor in the dtype of the file."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        rows = out.view(1) if out.dim() == 0 else out
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(bytes_of(rows)) != entry.nbytes:
                raise HubFormatError(f"{entry.file}: it ends within {name!r}; get it anew")
        return out


def open_tensors(folder: Path) -> HubTensors:
    """Return the tensors of *folder*; headers are read and checked, values are not.

    Raises:
        HubFormatError: If there are no weights, a file is missing or damaged, or the index does
            not say what the files hold.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = _weight_map(index)
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise HubFormatError(
                f"{index}: names files that are not there: {', '.join(missing)}; get them too"
            )
    elif (folder / SINGLE).is_file():
        weight_map, files = None, [SINGLE]
    else:
        raise HubFormatError(
            f"{folder}: holds neither {SINGLE} nor {INDEX}; name a folder with weights in"
            " safetensors files"
        )
    entries: dict[str, Entry] = {}
    metadata = {}
    for name in files:
        found, metadata[name] = read_header(folder / name)
        for entry in found:
            if entry.name in entries:
                raise HubFormatError(
                    f"{entry.file}: {entry.name!r} is also in {entries[entry.name].file.name};"
                    " a tensor belongs in one file"
                )
            entries[entry.name] = entry
    if weight_map is not None:
        _check_index(index, weight_map, entries)
    return HubTensors(folder, entries, metadata)


def read_header(file: Path) -> tuple[list[Entry], dict[str, str]]:
    """Return the tensors of one file in the order of their values, and its metadata.

    Raises:
        HubFormatError: If it is not a whole safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header, begin = _header(stream, size, file)
    metadata = header.pop("__metadata__", None) or {}
    entries, at = [], 0
    for name, value in sorted(header.items(), key=lambda item: _offsets(file, *item)):
        start, stop = _offsets(file, name, value)
        dtype, shape = value["dtype"], tuple(value["shape"])
        if dtype not in DTYPES:
            raise HubFormatError(
                f"{file}: {name!r} has dtype {dtype}; known are {', '.join(DTYPES)}"
            )
        entry = Entry(name=name, dtype=dtype, shape=shape, file=file, start=begin + start)
        if start != at or stop - start != entry.nbytes:
            raise HubFormatError(
                f"{file}: {name!r} of shape {list(shape)} and dtype {dtype} has bytes {start} to"
                f" {stop}, expected {at} to {at + entry.nbytes}; the header is damaged, get it anew"
            )
        at = stop
        entries.append(entry)
    if begin + at != size:
        raise HubFormatError(
            f"{file}: has {size} bytes, its header needs {begin + at}; it is"
            f" {'truncated' if size < begin + at else 'damaged'}, get it anew"
        )
    return entries, {str(k): str(v) for k, v in metadata.items()}


def _header(stream: BinaryIO, size: int, file: Path) -> tuple[dict[str, Any], int]:
    first = stream.read(LENGTH.size)
    length = LENGTH.unpack(first)[0] if len(first) == LENGTH.size else -1
    if not 0 < length <= min(_LONGEST_HEADER, size - LENGTH.size):
        raise HubFormatError(
            f"{file}: has {size} bytes and no whole safetensors header; it is truncated or not a"
            " safetensors file (a pointer of git-lfs?), get it anew"
        )
    try:
        header = json.loads(stream.read(length))
    except ValueError as error:
        raise HubFormatError(f"{file}: its header is no JSON ({error}); get it anew") from error
    if not isinstance(header, dict):
        raise HubFormatError(f"{file}: its header is no mapping; get it anew")
    return header, LENGTH.size + length


def _offsets(file: Path, name: str, value: Any) -> tuple[int, int]:
    try:
        start, stop = value["data_offsets"]
        value["dtype"], tuple(value["shape"])
        return int(start), int(stop)
    except (KeyError, TypeError, ValueError) as error:
        raise HubFormatError(f"{file}: the entry of {name!r} is damaged; get it anew") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubFormatError(
            f'{index}: is no index ({error!r}); expected JSON with "weight_map"'
        ) from error


def _check_index(index: Path, weight_map: dict[str, str], entries: Mapping[str, Entry]) -> None:
    wrong = [
        f"{name!r} is in {entries[name].file.name if name in entries else 'no file'}, not in {file}"
        for name, file in weight_map.items()
        if name not in entries or entries[name].file.name != file
    ]
    wrong += [
        f"{n!r} of {e.file.name} is left out" for n, e in entries.items() if n not in weight_map
    ]
    if wrong:
        raise HubFormatError(
            f"{index}: does not say what the files hold: {listing(wrong)}; get the index and the"
            " files of one version"
        )


def listing(items: Sequence[str]) -> str:
    """Return *items* in one line."""
    return "; ".join(items)


def _values(data: bytearray, dtype: torch.dtype) -> Tensor:
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, to read into or write from."""
    data: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)
