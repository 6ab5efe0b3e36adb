# SPDX-License-Identifier: Apache-2.0
"""All calls of tensorstore: one rank's bytes as a sharded, checksummed 1-D zarr3 array."""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts
from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

Bytes = npt.NDArray[np.uint8]

INNER_BYTES = 1 << 20
"""Bytes under one crc32c; the smallest amount worth reading."""
SHARD_BYTES = 32 << 20
"""Bytes in one file; two are in flight while writing."""
_IN_FLIGHT = 2

# One context for the process: two stores of one memory:// name see the same data.
_CONTEXT = ts.Context()


@frozen
class Grid:
    """How a packed array is cut.

    Attributes:
        nbytes: Length of the array.
        inner: Bytes under one checksum.
        shard: Bytes in one file, a multiple of ``inner``.
    """

    nbytes: int
    inner: int
    shard: int

    @classmethod
    def of(cls, nbytes: int) -> Grid:
        """Return the grid for a new array of *nbytes*, not 0."""
        inner = min(INNER_BYTES, -(-nbytes // 4096) * 4096)
        return cls(nbytes, inner, inner * min(SHARD_BYTES // inner, -(-nbytes // inner)))


def array_metadata(grid: Grid) -> dict[str, Any]:
    """Return the zarr v3 metadata (the content of ``zarr.json``) of a packed array.

    Source: zarr v3 specification, sharding_indexed and crc32c codecs.
    """
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [grid.inner],
        "codecs": [{"name": "bytes"}, crc],
        "index_codecs": [little, crc],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [grid.nbytes],
        "data_type": "uint8",
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [grid.shard]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def encode_metadata(grid: Grid) -> bytes:
    """Return the exact content of ``zarr.json`` of a packed array."""
    return json.dumps(array_metadata(grid), indent=1).encode()


def open_array(kvstore: Mapping[str, Any], path: str, grid: Grid) -> Any:
    """Return the packed array at *path*, without touching the storage.

    A chunk that is missing is an error at read, never zeros, and a chunk of zeros is written.
    """
    metadata = array_metadata(grid)
    del metadata["zarr_format"], metadata["node_type"]
    spec = {
        "driver": "zarr3",
        "kvstore": {**kvstore, "path": f"{kvstore['path']}{path}/"},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, open=True, assume_metadata=True, context=_CONTEXT).result()


def write_array(kvstore: Mapping[str, Any], path: str, data: Bytes, grid: Grid) -> None:
    """Write *data* (1-D, not empty) as the packed array at *path*; durable on return.

    Raises:
        ValueError: As tensorstore says it.
    """
    array = open_array(kvstore, path, grid)
    pending: deque[Any] = deque()
    for start in range(0, len(data), grid.shard):
        while len(pending) >= _IN_FLIGHT:
            pending.popleft().result()
        part = slice(start, min(start + grid.shard, len(data)))
        write = array[part].write(data[part], can_reference_source_data_indefinitely=True)
        pending.append(write)
    while pending:
        pending.popleft().result()


def start_read(array: Any, start: int, out: Bytes) -> Any:
    """Begin reading ``len(out)`` bytes from *start* into *out*; ``.result()`` waits for them."""
    source = array[start : start + len(out)].translate_to[0]
    return ts.array(out, copy=False, context=_CONTEXT).write(source)


def get(kvstore: Mapping[str, Any], path: str) -> bytes | None:
    """Return the file at *path*, or None where there is none."""
    result = _open(kvstore).read(path).result()
    return bytes(result.value) if result.state == "value" else None


def put(kvstore: Mapping[str, Any], path: str, data: bytes) -> None:
    """Write the file at *path*."""
    _open(kvstore).write(path, data).result()


def delete(kvstore: Mapping[str, Any], path: str) -> None:
    """Delete the file at *path* and everything below it."""
    store = _open(kvstore)
    store.delete_range(ts.KvStore.KeyRange(f"{path}/", f"{path}0")).result()
    store.write(path, None).result()


def list_below(kvstore: Mapping[str, Any], prefix: str) -> list[str]:
    """Return all names that begin with *prefix*, without it."""
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
    names = _open(kvstore).list(ts.KvStore.KeyRange(prefix, end)).result()
    return [name.decode()[len(prefix) :] for name in names]


def _open(kvstore: Mapping[str, Any]) -> Any:
    return ts.KvStore.open(dict(kvstore), context=_CONTEXT).result()
