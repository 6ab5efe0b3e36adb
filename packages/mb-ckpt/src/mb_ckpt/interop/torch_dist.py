# SPDX-License-Identifier: Apache-2.0
"""Folders that megatron-core's ``dist_checkpointing`` writes in its format ``torch_dist``.

They are DCP's, with the keys of the sharded tensors, entries ``KEY/shard_OFFSET_SHAPE`` for sharded
objects, ``common.pt`` for what is no shard, and ``metadata.json``. A store keeps the tensors under the
same keys and the objects as it keeps those of a ``sharded_state_dict``, so that one loads from it.
"""

from __future__ import annotations

import json
import os
import re
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from mb_ckpt.errors import CheckpointError
from mb_ckpt.interop.dcp import DcpFiles
from mb_ckpt.interop.dcp_writer import refuse_pickles, save_through_dcp
from mb_ckpt.interop.foreign import Incoming
from mb_ckpt.interop.restricted_pickle import LEFT_OUT, read_object, to_state
from mb_ckpt.states.megatron import decode_object, encode_object
from mb_ckpt.states.storable import TensorToRead

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from mb_ckpt.interop.foreign import Outgoing

_OBJECT = re.compile(r"/shard_\d+(\.\d+)*_\d+(\.\d+)*$")
_ABOUT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_COMMON = "common.pt"
_REFORMULATED = "nd_reformulated_orig_global_shape"


def open_torch_dist(path: Path, *, allow_pickle: bool = False) -> Incoming:
    """Return what a ``torch_dist`` folder holds: tensors by key, and the common state beside them.

    Args:
        path: The folder.
        allow_pickle: Whether to run the pickles of ``common.pt`` and of objects, and keep what is
            nothing plain as a pickle; else only plain data are taken over.

    Raises:
        CheckpointError: If it is no such folder, or damaged.
    """
    files = DcpFiles.open(path)
    left_out: list[str] = []
    state: dict[str, Any] = {}
    common = path / _COMMON
    if common.is_file():
        found = read_object(common, str(common), allow_pickle=allow_pickle)
        plain = to_state(found, "", left_out, allow_pickle=allow_pickle)
        state = plain if isinstance(plain, dict) else {}
    reformulated = getattr(files.metadata, "mcore_data", None) or {}
    for key in files.metadata.state_dict_metadata:
        value: Any = files.tensor(key)
        if value is None:
            value = _object(files, key, left_out, allow_pickle=allow_pickle)
        elif original := (reformulated.get(key) or {}).get(_REFORMULATED):
            value = _in_original_shape(value, tuple(original), f"{path}, tensor {key!r}")
        if key in state:
            raise CheckpointError(f"{common} and the tensors of {path} both have a {key!r}")
        if value is not LEFT_OUT:
            state[key] = value
    iteration = state.get("iteration")
    return Incoming(
        format="torch_dist",
        path=str(path),
        step=iteration if isinstance(iteration, int) else None,
        state=state,
        left_out=tuple(left_out),
    )


def _object(files: DcpFiles, key: str, left_out: list[str], *, allow_pickle: bool) -> Any:
    """Return a sharded object as the bytes that a store keeps of it."""
    where = f"{files.path}, object {key!r}"
    value = read_object(files.read_bytes(key), where, allow_pickle=allow_pickle)
    if isinstance(value, list) and len(value) == 1:  # Megatron stores those of one key as a list
        (value,) = value
    try:
        data = encode_object(value, key)
    except CheckpointError:
        value = to_state(value, key, left_out, allow_pickle=False)
        if value is LEFT_OUT:
            return LEFT_OUT
        data = encode_object(value, key)
    return TensorToRead(
        dtype=data.dtype, shape=tuple(data.shape), read_rows=lambda start, stop: data[start:stop]
    )


def _in_original_shape(tensor: TensorToRead, shape: tuple[int, ...], where: str) -> TensorToRead:
    """Return a tensor that was stored by pieces, each flattened, in the shape that it had.

    Megatron stored a flattened tensor of *shape*, cut into a grid of equal pieces, as one of shape
    ``(*grid, elements of a piece)``.
    """
    grid, elements = tensor.shape[:-1], tensor.shape[-1]
    fits = len(grid) == len(shape) and all(n % g == 0 for n, g in zip(shape, grid, strict=True))
    if not fits or prod(shape) != prod(grid) * elements:
        raise CheckpointError(f"{where} of shape {list(tensor.shape)} was never {list(shape)}")
    piece = [n // g for n, g in zip(shape, grid, strict=True)]
    order = [d for pair in zip(range(len(grid)), range(len(grid), 2 * len(grid)), strict=True)
             for d in pair]  # fmt: skip
    kept: list[Tensor] = []

    def read_rows(start: int, stop: int) -> Tensor:
        if not kept:
            stored = tensor.read_rows(0, tensor.shape[0])
            kept.append(stored.reshape(*grid, *piece).permute(order).reshape(shape))
        rows = kept[0][start:stop]
        if stop == shape[0]:
            kept.clear()
        return rows

    return TensorToRead(dtype=tensor.dtype, shape=shape, read_rows=read_rows)


def write_torch_dist(
    folder: Path, outgoing: Outgoing, *, progress: Callable[[int, int], None]
) -> None:
    """Write *outgoing* so that megatron-core's ``dist_checkpointing.load`` reads it, in any layout.

    Tensors become sharded tensors under their keys, objects that were saved as ``ShardedObject``
    become such again, and plain data the common state.

    Args:
        folder: There and empty; durable on return.
        outgoing: What to write.
        progress: Called with the bytes written so far, and all that will be.

    Raises:
        CheckpointError: If plain data hold pickles.
        OSError: If the storage refuses.
    """
    state: dict[str, Any] = {}
    for key, tensor in outgoing.tensors.items():
        state[key] = [_decoded(key, tensor)] if _is_object(key, tensor) else tensor
    common = {"iteration": outgoing.step, **outgoing.plain}
    refuse_pickles(common)
    save_through_dcp(folder, state, progress, nested=False)
    _write(folder / _COMMON, lambda file: torch.save(common, file))
    text = json.dumps(_ABOUT).encode()
    _write(folder / "metadata.json", lambda file: file.write(text))


def _is_object(key: str, tensor: TensorToRead) -> bool:
    return (
        _OBJECT.search(key) is not None and tensor.dtype == torch.uint8 and len(tensor.shape) == 1
    )


def _decoded(key: str, tensor: TensorToRead) -> Any:
    rows = tensor.read_rows(0, tensor.shape[0])
    try:
        return decode_object(rows)
    except ValueError as e:
        raise CheckpointError(f"tensor {key!r} has the name of an object, but is none: {e}") from e


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
