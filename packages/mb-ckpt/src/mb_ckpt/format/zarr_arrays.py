# SPDX-License-Identifier: Apache-2.0
"""Layout ``zarr``: every tensor a zarr3 array of its own, which other zarr tools can read."""

from __future__ import annotations

import json
from collections import deque
from math import gcd, prod
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import ml_dtypes
import numpy as np

from mb_ckpt.format.packed import open_array, zstd
from mb_ckpt.format.tensorstore_io import start_put

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mb_ckpt.format.tensorstore_io import Bytes
    from mb_ckpt.saving.on_demand import BytesOnDemand
    from mb_ckpt.states.boxes import Box

CHUNK_BYTES = 8 << 20
"""About the most bytes in one chunk, which is one file with one crc32c."""
_SMALL = 16 << 10
_IN_FLIGHT = 64
_OPAQUE = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}
_KNOWN = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
    "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz",
}  # fmt: skip


def array_name(key: str) -> str:
    """Return the directory of the tensor *key*: the key itself, but for unsafe characters.

    Characters other than letters, digits and ``_.-~`` are percent-encoded, as is the first
    character of names that zarr or file systems keep for themselves.
    """
    name = quote(key, safe="")
    if name in ("", ".", "..", "zarr.json") or name.startswith("__"):
        return f"%{ord(name[0]):02X}{name[1:]}" if name else "%"
    return name


def zarr_dtype(dtype: str, width: int) -> str:
    """Return the zarr data type for a torch *dtype*; integers of *width* bytes where zarr has none."""
    return dtype if dtype in _KNOWN else _OPAQUE[width]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy type of a zarr data type."""
    kind = getattr(ml_dtypes, name, None)
    return np.dtype(name if kind is None else kind)


def chunk_shape(shape: Sequence[int], width: int, boxes: Sequence[Box]) -> tuple[int, ...]:
    """Return the shape of the chunks for a tensor that is written as *boxes*.

    Where that does not make them tiny, no chunk has values of two boxes. Chunks are cut down to
    about 8 MiB, the first dimensions first.
    """
    sizes = []
    for d, extent in enumerate(shape):
        edges = {edge for b in boxes for edge in (b.offset[d], b.offset[d] + b.shape[d])}
        sizes.append(gcd(*(edge for edge in edges if edge < extent)) or max(1, extent))
    if prod(sizes) * width < _SMALL and prod(sizes) < prod(shape):
        sizes = [max(1, n) for n in shape]  # pieces share chunks: written in turn
    return _limited(sizes, shape, width)


def _limited(sizes: list[int], shape: Sequence[int], width: int) -> tuple[int, ...]:
    for d, size in enumerate(sizes):
        most = CHUNK_BYTES // max(1, prod(sizes[d + 1 :]) * width)
        if prod(sizes[d:]) * width <= CHUNK_BYTES:
            break
        if size == shape[d]:  # nobody else's boundary: any cut will do
            sizes[d] = max(1, min(size, most))
        else:
            sizes[d] = max(n for n in range(1, size + 1) if size % n == 0 and n <= max(1, most))
    return tuple(sizes)


def is_shared(shape: Sequence[int], chunks: Sequence[int], box: Box) -> bool:
    """Return whether *box* of a tensor of *shape* fills some chunk only in part."""
    for extent, chunk, low, size in zip(shape, chunks, box.offset, box.shape, strict=True):
        if low % chunk or ((low + size) % chunk and low + size != extent):
            return True
    return False


def array_metadata(
    dtype: str, shape: Sequence[int], chunks: Sequence[int], compression: int | None
) -> dict[str, Any]:
    """Return the zarr v3 metadata of a tensor; *dtype* is zarr's.

    Source: zarr v3 specification, zstd and crc32c codecs.
    """
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    whole = {"name": "bytes"}
    fill: Any = False if dtype == "bool" else 0
    if dtype.startswith("complex"):
        fill = [0.0, 0.0]
    elif "float" in dtype:
        fill = 0.0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "fill_value": fill,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [
            whole if numpy_dtype(dtype).itemsize == 1 else little,
            *zstd(compression),
            {"name": "crc32c"},
        ],
    }


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Return the exact content of the ``zarr.json`` with *metadata*."""
    return json.dumps(metadata, indent=1).encode()


GROUP = encode_metadata({"zarr_format": 3, "node_type": "group", "attributes": {}})
"""The ``zarr.json`` of the directory that holds all arrays of a step."""


def write_arrays(
    kvstore: Mapping[str, Any],
    path: str,
    data: Bytes | BytesOnDemand,
    arrays: Iterable[Mapping[str, Any]],
) -> None:
    """Write boxes of tensors out of *data* into their arrays below *path*; durable on return.

    Args:
        kvstore: The place.
        path: The step's data directory.
        data: This rank's buffer.
        arrays: For each: ``name``, ``metadata``, whether to write it (``first``), and ``boxes``, each
            ``[start, offset, shape]``.

    Raises:
        ValueError: As tensorstore says it.
    """
    pending: deque[Any] = deque()
    for array in arrays:
        metadata = array["metadata"]
        where = f"{path}/{array['name']}"
        if array["first"]:
            raw = encode_metadata(metadata)
            pending.append(start_put(kvstore, f"{where}/zarr.json", raw))
        target: Any = open_array(kvstore, where, metadata) if array["boxes"] else None
        dtype = numpy_dtype(metadata["data_type"])
        for start, offset, shape in array["boxes"]:
            values = data[start : start + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            part = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            place = target[part] if part else target
            pending.append(place.write(values, can_reference_source_data_indefinitely=True))
            while len(pending) >= _IN_FLIGHT:
                pending.popleft().result()
    while pending:
        pending.popleft().result()


def grid_of(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many chunks an array has along each dimension; none where it is empty."""
    if not prod(shape):
        return (0,) * max(1, len(shape))
    return tuple(-(-n // c) for n, c in zip(shape, chunks, strict=True))
