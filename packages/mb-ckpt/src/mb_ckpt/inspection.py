# SPDX-License-Identifier: Apache-2.0
"""What a step holds, and whether every byte of it is as it was written."""

from __future__ import annotations

import hashlib
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import field, frozen

from mb_ckpt.errors import CheckpointError, CorruptCheckpointError
from mb_ckpt.format.tensorstore_io import get
from mb_ckpt.format.zarr_arrays import grid_of
from mb_ckpt.loading.packed_reader import damage, data_path, open_file
from mb_ckpt.loading.segments import READ_BYTES
from mb_ckpt.loading.zarr_reader import verify_arrays
from mb_ckpt.places.catalogue import step_name
from mb_ckpt.states import plain_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from mb_ckpt.format.manifest import Manifest
    from mb_ckpt.interfaces import Store


@frozen(kw_only=True)
class TensorInfo:
    """One stored tensor.

    Attributes:
        dtype: As torch prints it, without the prefix.
        shape: Of the whole tensor.
        nbytes: Of the whole tensor.
        pieces: In how many boxes it is stored; in layout zarr, in how many chunks.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: int


@frozen(kw_only=True)
class StepInfo:
    """What one step holds.

    Attributes:
        step: Optimizer steps done.
        path: Its directory.
        nbytes: Of all tensors.
        world_size: Ranks that wrote it.
        layout: ``"packed"`` or ``"zarr"``.
        compression: Level of zstd, None for none.
        metrics: As given to ``save``.
        created: When it was committed, ISO 8601, UTC.
        versions: Of the software that wrote it.
        tensors: By key.
        plain: The plain data.
    """

    step: int
    path: str
    nbytes: int
    world_size: int
    layout: str
    compression: int | None
    metrics: dict[str, float]
    created: str
    versions: dict[str, str]
    tensors: dict[str, TensorInfo] = field(repr=False)
    plain: Any = field(repr=False)


@frozen(kw_only=True)
class Verified:
    """A step whose every byte was read and found as written.

    Attributes:
        step: Which.
        tensors: How many it holds.
        nbytes: Bytes read, padding included.
    """

    step: int
    tensors: int
    nbytes: int


def describe(store: Store, manifest: Manifest) -> StepInfo:
    """Return what *manifest* says."""
    tensors = {
        key: TensorInfo(
            dtype=t.dtype,
            shape=t.shape,
            nbytes=prod(t.shape) * getattr(torch, t.dtype).itemsize,
            pieces=len(t.chunks)
            if t.chunk_shape is None
            else prod(grid_of(t.shape, t.chunk_shape)),
        )
        for key, t in manifest.tensors.items()
    }
    return StepInfo(
        step=manifest.step,
        path=f"{store.url}/{step_name(manifest.step)}",
        nbytes=sum(t.nbytes for t in tensors.values()),
        world_size=manifest.world_size,
        layout=manifest.layout,
        compression=manifest.compression,
        metrics=manifest.metrics,
        created=manifest.created,
        versions=manifest.versions,
        tensors=tensors,
        plain=plain_tree.decode(manifest.tree) or {},
    )


def verify(
    store: Store, manifest: Manifest, progress: Callable[[int, int], None] = lambda *_: None
) -> Verified:
    """Read every byte of the step.

    Args:
        store: Where it is.
        manifest: Of the step.
        progress: Called with the bytes read so far, and all that will be.

    Raises:
        CorruptCheckpointError: If something is damaged or missing; names tensors and files.
    """
    faults: list[str] = []
    nbytes = sum(file.grid.nbytes for file in manifest.files)
    if manifest.layout == "zarr":
        nbytes = describe(store, manifest).nbytes
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        progress(done, nbytes)

    for index in range(len(manifest.files)):
        _verify_file(store, manifest, index, faults, read)
    if manifest.layout == "zarr":
        nbytes = verify_arrays(store, manifest, faults, read)
    if faults:
        more = f" (and {len(faults) - 1} more damaged places)" if len(faults) > 1 else ""
        raise CorruptCheckpointError(f"{faults[0]}{more}")
    return Verified(
        step=manifest.step,
        tensors=len(manifest.tensors),
        nbytes=nbytes,
    )


def _verify_file(
    store: Store, manifest: Manifest, index: int, faults: list[str], read: Callable[[int], None]
) -> None:
    file = manifest.files[index]
    path = data_path(manifest, index)
    metadata = get(store.kvstore, f"{path}/zarr.json")
    if metadata is None or hashlib.sha256(metadata).hexdigest() != file.sha256:
        kind = "missing" if metadata is None else "corrupt"
        faults.append(f"{store.url}/{path}/zarr.json is {kind}: load another step")
    array = open_file(store, manifest, index)
    inner, nbytes = file.grid.inner, file.grid.nbytes
    step = max(1, READ_BYTES // inner) * inner
    buffer = np.empty(step, dtype=np.uint8)
    for start in range(0, nbytes, step):
        stop = min(start + step, nbytes)
        read(stop - start)
        if _fault(array, start, buffer[: stop - start]) is None:
            continue
        for low in range(start, stop, inner):
            high = min(low + inner, stop)
            fault = _fault(array, low, buffer[: high - low])
            if fault is not None:
                keys = _keys_within(manifest, index, low, high)
                faults.append(str(damage(f"{store.url}/{path}", keys, fault)))


def _fault(array: Any, start: int, out: Any) -> Exception | None:
    try:
        array.read(start, [out.data], past_cache=True)
    except (ValueError, OSError, CheckpointError) as e:
        return e
    return None


def _keys_within(manifest: Manifest, index: int, low: int, high: int) -> list[str]:
    """Return the tensors with bytes in ``low:high`` of a file."""
    keys = []
    for key, entry in manifest.tensors.items():
        width = getattr(torch, entry.dtype).itemsize
        for file, start, _, shape in entry.chunks:
            if file == index and start < high and start + prod(shape) * width > low:
                keys.append(key)
                break
    return keys
