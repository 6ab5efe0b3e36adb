# SPDX-License-Identifier: Apache-2.0
"""Layout ``packed``: one rank's bytes as a sharded, checksummed 1-D zarr3 array."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts
from attrs import frozen

from mb_ckpt.format.local_reader import LocalArray
from mb_ckpt.format.local_writer import is_local, write_shards
from mb_ckpt.format.tensorstore_io import CONTEXT, below, start_read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mb_ckpt.format.tensorstore_io import Bytes
    from mb_ckpt.saving.on_demand import BytesOnDemand

ALIGNMENT = 16
"""Every piece begins at a multiple of this many bytes: the widest dtype, complex128."""
INNER_BYTES = 1 << 20
"""Bytes under one crc32c; the smallest amount worth reading."""
SHARD_BYTES = 8 << 20
"""Bytes in one file of arrays up to 4 GiB: small enough for the allocator to reuse the buffers that
chunks are encoded into, instead of getting fresh pages for each."""
LOCAL_SHARD_BYTES = 64 << 20
"""The same where nothing is encoded: every file costs a sync."""
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
    def of(cls, nbytes: int, compression: int | None = None, *, local: bool = False) -> Grid:
        """Return the grid for a new array of *nbytes*, not 0.

        Args:
            nbytes: Length of the array.
            compression: Level of zstd, None for none.
            local: Whether `mb_ckpt.format.local_writer` writes it.
        """
        inner = min(INNER_BYTES, -(-nbytes // 4096) * 4096)
        least = LOCAL_SHARD_BYTES if local else SHARD_BYTES
        wanted = min(max(least, nbytes // _MOST_FILES), _LARGEST_SHARD_BYTES)
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


class RemoteArray:
    """A packed array that tensorstore reads.

    Args:
        kvstore: The place.
        path: Of the array.
        grid: How it is cut.
    """

    def __init__(self, kvstore: Mapping[str, Any], path: str, grid: Grid) -> None:
        self._array = open_array(kvstore, path, array_metadata(grid))

    def read(
        self,
        start: int,
        buffers: Sequence[memoryview],
        *,
        past_cache: bool = False,  # noqa: ARG002  # as of LocalArray
    ) -> None:
        """Fill *buffers*, one after the other, with the bytes of the array from *start* on.

        Args:
            start: First byte.
            buffers: Where to.
            past_cache: Of no meaning here, where tensorstore decides; see `LocalArray.read`.

        Raises:
            OSError: If the storage refuses.
            ValueError: As tensorstore says it, if bytes are missing or damaged.
        """
        reads = []
        for buffer in buffers:
            out = np.frombuffer(buffer, np.uint8)
            reads.append(start_read(self._array, slice(start, start + len(out)), out))
            start += len(out)
        try:
            for read in reads:
                read.result()
        finally:
            for read in reads:  # they write into memory that may be freed
                read.exception()


def open_packed(kvstore: Mapping[str, Any], path: str, grid: Grid) -> LocalArray | RemoteArray:
    """Return the packed array at *path* for reading, without touching the storage."""
    if is_local(kvstore, grid.compression):
        return LocalArray(Path(kvstore["path"]) / path, grid)
    return RemoteArray(kvstore, path, grid)


def write_array(
    kvstore: Mapping[str, Any],
    path: str,
    data: Bytes | BytesOnDemand,
    grid: Grid,
    *,
    read_soon: bool = False,
) -> None:
    """Write *data* (1-D, not empty) as the packed array at *path*; durable on return.

    Args:
        kvstore: The place.
        path: Of the array.
        data: The bytes.
        grid: How to cut them.
        read_soon: Whether to keep them in the page cache of this machine, for who copies them.

    Raises:
        OSError: If the storage refuses.
        ValueError: As tensorstore says it.
    """
    if is_local(kvstore, grid.compression):
        write_shards(Path(kvstore["path"]) / path, data, grid, direct=not read_soon)
        return
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
