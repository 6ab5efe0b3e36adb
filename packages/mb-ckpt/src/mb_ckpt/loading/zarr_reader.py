# SPDX-License-Identifier: Apache-2.0
"""Filling pieces from a step in layout ``zarr``, and reading all of it to check it."""

from __future__ import annotations

from collections import deque
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import define, field

from mb_ckpt.format.packed import open_array
from mb_ckpt.format.tensorstore_io import get, start_read
from mb_ckpt.format.zarr_arrays import (
    array_metadata,
    array_name,
    encode_metadata,
    grid_of,
    numpy_dtype,
    zarr_dtype,
)
from mb_ckpt.loading.packed_reader import damage
from mb_ckpt.places.catalogue import step_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mb_ckpt.format.manifest import Manifest, TensorEntry
    from mb_ckpt.interfaces import Store
    from mb_ckpt.states.boxes import Box
    from mb_ckpt.states.pieces import Piece

_IN_FLIGHT_BYTES = 64 << 20
_IN_FLIGHT = 64


@define(eq=False)
class _Reads:
    """Reads under way, each with what to do when it is there."""

    store: Store
    manifest: Manifest
    nbytes: int = 0
    pending: deque[tuple[str, int, Any, Callable[[], None]]] = field(factory=deque)
    faults: list[Exception] = field(factory=list)

    def start(self, key: str, array: Any, where: Any, out: Any, then: Callable[[], None]) -> None:
        """Begin reading ``array[where]`` into the numpy array *out*."""
        while self.pending and (
            self.nbytes + out.nbytes > _IN_FLIGHT_BYTES or len(self.pending) >= _IN_FLIGHT
        ):
            self._finish()
        self.pending.append((key, out.nbytes, start_read(array, where, out), then))
        self.nbytes += out.nbytes

    def finish(self) -> None:
        """Wait for all."""
        while self.pending:
            self._finish()

    def _finish(self) -> None:
        key, nbytes, future, then = self.pending.popleft()
        self.nbytes -= nbytes
        try:
            future.result()
        except (ValueError, OSError) as e:
            path = f"{self.store.url}/{_path(self.manifest, key)}"
            self.faults.append(damage(path, [key], e))
        else:
            then()


def fill_arrays(store: Store, manifest: Manifest, pieces: list[Piece]) -> None:
    """Write the stored values into the data of *pieces*, which fit the step.

    Raises:
        CorruptCheckpointError: If stored bytes are damaged or missing; names tensor and file.
    """
    reads = _Reads(store, manifest)
    for piece in pieces:
        key = piece.spec.key
        entry = manifest.tensors[key]
        metadata = _metadata(manifest, entry)
        array = None
        for box, view in piece.views():
            array = array or open_array(store.kvstore, _path(manifest, key), metadata)
            out, then = _room(view, metadata["data_type"])
            reads.start(key, array, _slices(box), out, then)
    reads.finish()
    if reads.faults:
        raise reads.faults[0]


def verify_arrays(
    store: Store, manifest: Manifest, faults: list[str], read: Callable[[int], None]
) -> int:
    """Read every byte of the step; return how many, and put what is damaged into *faults*.

    Args:
        store: Where it is.
        manifest: Of the step.
        faults: Gets a line each.
        read: Called with the bytes of every chunk.
    """
    reads, total = _Reads(store, manifest), 0
    for key, entry in manifest.tensors.items():
        metadata, path = _metadata(manifest, entry), _path(manifest, key)
        found = get(store.kvstore, f"{path}/zarr.json")
        if found != encode_metadata(metadata):
            kind = "missing" if found is None else "corrupt"
            faults.append(f"{store.url}/{path}/zarr.json is {kind}: load another step")
        array = open_array(store.kvstore, path, metadata)
        chunks = entry.chunk_shape or ()
        dtype = numpy_dtype(metadata["data_type"])
        for index in product(*(range(n) for n in grid_of(entry.shape, chunks))):
            where = tuple(
                slice(i * c, min((i + 1) * c, n))
                for i, c, n in zip(index, chunks, entry.shape, strict=False)
            )
            out = np.empty([s.stop - s.start for s in where], dtype)
            total += out.nbytes
            read(out.nbytes)
            reads.start(key, array, where, out, _nothing)
    reads.finish()
    faults += [str(fault) for fault in reads.faults]
    return total


def _metadata(manifest: Manifest, entry: TensorEntry) -> dict[str, Any]:
    width = getattr(torch, entry.dtype).itemsize
    dtype = zarr_dtype(entry.dtype, width)
    return array_metadata(dtype, entry.shape, entry.chunk_shape or (), manifest.compression)


def _path(manifest: Manifest, key: str) -> str:
    return f"{step_name(manifest.step)}/{manifest.data}/{array_name(key)}"


def _slices(box: Box) -> Any:
    if not box.shape:
        return ()
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))


def _nothing() -> None:
    """There is nothing to hand out."""


def _room(view: Tensor, dtype: str) -> tuple[Any, Callable[[], None]]:
    """Return a numpy array to read into, and what brings its values to *view*."""
    kind = numpy_dtype(dtype)
    if view.device.type == "cpu":
        return _as_numpy(view, kind), _nothing
    room = torch.empty(view.shape, dtype=view.dtype)

    def copy() -> None:
        view.copy_(room)

    return _as_numpy(room, kind), copy


def _as_numpy(tensor: Tensor, kind: Any) -> Any:
    width = tensor.element_size()
    opaque = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if width in opaque:
        return tensor.view(opaque[width]).numpy().view(kind)
    return tensor.numpy()
