# SPDX-License-Identifier: Apache-2.0
"""A folder of safetensors files whose tensors are written in any order, a block at a time."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Self

from attrs import frozen

from mb_engine.bridge.errors import MappingError
from mb_engine.bridge.hub_format import DTYPES, INDEX, LENGTH, SINGLE, bytes_of, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import torch
    from torch import Tensor

FILE_BYTES = 5 * 10**9
"""Most bytes of values in one file, unless one tensor is more."""

_PARTIAL = ".partial"
_ALIGNMENT = 8


@frozen(kw_only=True)
class Planned:
    """A tensor to be written.

    Attributes:
        name: Of the tensor.
        dtype: Key of :data:`mb_engine.bridge.hub_format.DTYPES`.
        shape: Its extents.
        file: Name of its file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = SINGLE

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def in_files(tensors: Sequence[Planned], *, most: int = FILE_BYTES) -> list[Planned]:
    """Return *tensors* spread over files of at most *most* bytes, in their order."""
    files: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if filled and filled + tensor.nbytes > most:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += tensor.nbytes
    if len(files) == 1:
        return list(tensors)
    return [
        Planned(
            name=t.name,
            dtype=t.dtype,
            shape=t.shape,
            file=f"model-{i:05d}-of-{len(files):05d}.safetensors",
        )
        for i, file in enumerate(files, start=1)
        for t in file
    ]


class HubWriter:
    """Writes the files of a plan; they get their names when all of them are whole.

    Used as a context manager: leaving it with an error takes away what was written.

    Args:
        folder: Made if it is not there.
        plan: What is to be written; the order within a file is that of the plan.
        metadata: Text for the header of each file, by the file's name.
    """

    def __init__(
        self,
        folder: Path,
        plan: Iterable[Planned],
        *,
        metadata: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.folder = folder
        self._plan = {tensor.name: tensor for tensor in plan}
        self._starts: dict[str, int] = {}
        self._left = {name: tensor.nbytes for name, tensor in self._plan.items()}
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, int] = {}
        for file in dict.fromkeys(tensor.file for tensor in self._plan.values()):
            texts = (metadata or {}).get(file, {"format": "pt"})
            self._files[file] = self._begin(file, texts)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take away what is not finished."""
        for file, descriptor in self._files.items():
            os.close(descriptor)
            (self.folder / (file + _PARTIAL)).unlink(missing_ok=True)
        self._files = {}

    def write_rows(self, name: str, first: int, rows: Tensor, *, index: int | None = None) -> None:
        """Write rows of a tensor, converted to its dtype on disk.

        Args:
            name: Of the tensor.
            first: Number of the first row, along the first dimension; the second with *index*.
            rows: ``[rows, ...]`` on any device.
            index: Which of the matrices of a tensor of three dimensions, or None.
        """
        planned = self._plan[name]
        dtype = DTYPES[planned.dtype]
        shape = planned.shape if index is None else planned.shape[1:]
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        values = rows.detach().to(device="cpu", dtype=dtype).contiguous()
        row = first + (0 if index is None else index * shape[0])
        at = self._starts[name] + row * row_bytes
        data = bytes_of(values)
        done = 0
        while done < len(data):
            done += os.pwrite(self._files[planned.file], data[done:], at + done)
        self._left[name] -= len(data)

    def finish(self, *, index: bool = True) -> None:
        """Give the files their names.

        Args:
            index: Write the index where there is more than one file.

        Raises:
            MappingError: If a tensor has not been written whole; lists all of them.
        """
        missing = [name for name, left in self._left.items() if left]
        if missing:
            raise MappingError(
                f"{self.folder}: no parameter fills {listing(missing)}; the mapping of this family"
                " does not fit the model"
            )
        files, self._files = self._files, {}
        for file, descriptor in files.items():
            os.fsync(descriptor)
            os.close(descriptor)
            (self.folder / (file + _PARTIAL)).replace(self.folder / file)
        if index and len(files) > 1:
            content = {
                "metadata": {"total_size": sum(t.nbytes for t in self._plan.values())},
                "weight_map": {t.name: t.file for t in self._plan.values()},
            }
            (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    def _begin(self, file: str, metadata: Mapping[str, str]) -> int:
        """Write the header of *file* and return its open descriptor."""
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        tensors = [tensor for tensor in self._plan.values() if tensor.file == file]
        for tensor in tensors:
            stop = at + tensor.nbytes
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [at, stop],
            }
            self._starts[tensor.name] = at
            at = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        for tensor in tensors:
            self._starts[tensor.name] += LENGTH.size + len(text)
        path = self.folder / (file + _PARTIAL)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(descriptor, LENGTH.pack(len(text)) + text, 0)
        os.ftruncate(descriptor, LENGTH.size + len(text) + at)
        return descriptor


def dtype_name(dtype: torch.dtype) -> str:
    """Return what the format calls *dtype*."""
    return next(name for name, known in DTYPES.items() if known == dtype)
