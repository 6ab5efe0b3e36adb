# SPDX-License-Identifier: Apache-2.0
"""Layout ``packed``: one rank's bytes as a sharded, checksummed 1-D zarr3 array."""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any

import tensorstore as ts
from attrs import frozen

from mb_ckpt.format.tensorstore_io import CONTEXT, below

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_ckpt.format.tensorstore_io import Bytes
    from mb_ckpt.saving.on_demand import BytesOnDemand

ALIGNMENT = 16
"""Every piece begins at a multiple of this many bytes: the widest dtype, complex128."""
INNER_BYTES = 1 << 20
"""Bytes under one crc32c; the smallest amount worth reading."""
SHARD_BYTES = 8 << 20
"""Bytes in one file of arrays up to 4 GiB: small enough for the allocator to reuse the buffers that
chunks are encoded into, instead of getting fresh pages for each."""
_MOST_FILES = 512
_LARGEST_SHARD_BYTES = 64 << 20
_IN_FLIGHT_BYTES = 32 << 20


@frozen
class Grid:
    """How a packed array is cut.

    Attributes:
        nbytes: Length of the array.
        inner: Bytes under one checksum.
        shard: Bytes in one file, a multiple of ``inner``.
        compression: Level of zstd, None for none.
    """

    nbytes: int
    inner: int
    shard: int
    compression: int | None = None

    @classmethod
    def of(cls, nbytes: int, compression: int | None = None) -> Grid:
        """Return the grid for a new array of *nbytes*, not 0."""
        inner = min(INNER_BYTES, -(-nbytes // 4096) * 4096)
        wanted = min(max(SHARD_BYTES, nbytes // _MOST_FILES), _LARGEST_SHARD_BYTES)
        shard = inner * min(max(1, wanted // inner), -(-nbytes // inner))
        return cls(nbytes, inner, shard, compression)


def zstd(level: int | None) -> list[dict[str, Any]]:
    """Return the codecs that compress at *level*: one, or none for None."""
    return [] if level is None else [{"name": "zstd", "configuration": {"level": level}}]


def array_metadata(grid: Grid) -> dict[str, Any]:
    """Return the zarr v3 metadata (the content of ``zarr.json``) of a packed array.

    Source: zarr v3 specification, sharding_indexed, zstd and crc32c codecs.
    """
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    crc = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [grid.inner],
        "codecs": [{"name": "bytes"}, *zstd(grid.compression), crc],
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


def open_array(kvstore: Mapping[str, Any], path: str, metadata: Mapping[str, Any]) -> Any:
    """Return the array at *path*, without touching the storage.

    A chunk that is missing is an error at read, never zeros, and a chunk of zeros is written.
    """
    known = {k: v for k, v in metadata.items() if k not in ("zarr_format", "node_type")}
    spec = {
        "driver": "zarr3",
        "kvstore": below(kvstore, path),
        "metadata": known,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, open=True, assume_metadata=True, context=CONTEXT).result()


def write_array(
    kvstore: Mapping[str, Any], path: str, data: Bytes | BytesOnDemand, grid: Grid
) -> None:
    """Write *data* (1-D, not empty) as the packed array at *path*; durable on return.

    Raises:
        ValueError: As tensorstore says it.
    """
    array = open_array(kvstore, path, array_metadata(grid))
    pending: deque[Any] = deque()
    most = max(2, _IN_FLIGHT_BYTES // grid.shard)
    try:
        for start in range(0, len(data), grid.shard):
            while len(pending) >= most:
                pending.popleft().result()
            part = slice(start, min(start + grid.shard, len(data)))
            write = array[part].write(data[part], can_reference_source_data_indefinitely=True)
            pending.append(write)
        while pending:
            pending.popleft().result()
    finally:
        for write in pending:  # what failed is about to be removed
            write.exception()
