# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors in the memory of a block of rows.

Source: own, after https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON
header, little-endian; the header, which ends in spaces so that data begin at a multiple of eight; then
the values of all tensors, row-major, without holes.
"""

from __future__ import annotations

import json
import os
import re
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from mb_ckpt.errors import CheckpointError
from mb_ckpt.interop.safetensors_shards import FORMAT, METADATA, NAMES, PLAIN, SINGLE
from mb_ckpt.states import plain_tree
from mb_ckpt.states.storable import TensorToRead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from mb_ckpt.interop.foreign import Outgoing

BLOCK_BYTES = 16 << 20
"""Most bytes that are asked for at a time, unless one row is more."""
_HEADER_BYTES = 100_000_000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def write_safetensors(
    folder: Path,
    outgoing: Outgoing,
    *,
    progress: Callable[[int, int], None],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a step as ``model.safetensors``, or as shards with ``model.safetensors.index.json``.

    Args:
        folder: Empty; durable on return.
        outgoing: The step. Tensors that were in the state keep their places in it.
        progress: Called with the bytes written so far, and all that will be.
        max_shard_size: Bytes of tensors in one file, or such as ``"5GB"``.

    Raises:
        CheckpointError: If safetensors cannot hold a tensor, or plain data cannot be stored.
        OSError: If the storage refuses.
    """
    limit = size_in_bytes(max_shard_size)
    for key, tensor in outgoing.tensors.items():
        _check_holds(key, tensor)
    tree = _tree(outgoing)
    shards = _shards(outgoing.tensors, limit)
    total = sum(tensor.nbytes for tensor in outgoing.tensors.values())
    done = 0
    weights: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {key: outgoing.tensors[key] for key in keys}
        done = _write_file(folder / name, tensors, lambda n: progress(n, total), done)
        weights |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        _write_json(folder / f"{SINGLE}.index.json", index, indent=2)
    _write_json(folder / PLAIN, {"format": FORMAT, "step": outgoing.step, "tree": tree})
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    progress(total, total)


def size_in_bytes(size: int | str) -> int:
    """Return *size*, a number of bytes or such as ``"5GB"`` or ``"512 MiB"``, in bytes.

    Raises:
        CheckpointError: If it is neither, or less than one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B?)\s*", str(size), re.IGNORECASE)
    found = 0
    if match:
        unit = match[2].upper()
        power = "KMGT".index(unit) + 1 if unit else 0
        found = int(float(match[1]) * (1024**power if match[3] else _UNITS[unit]))
    if found < 1:
        raise CheckpointError(f"max_shard_size={size!r}: expected a size such as '5GB' or '512MiB'")
    return found


def _check_holds(key: str, tensor: TensorToRead) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in NAMES:
        raise CheckpointError(
            f"tensor {key!r} is {dtype}, which safetensors cannot hold: choose others with prefix, "
            "or export to 'dcp'"
        )
    if key == METADATA:
        raise CheckpointError(f"tensor {key!r} has a name that safetensors keeps: rename it")


def _tree(outgoing: Outgoing) -> Any:
    """Return the state as in a manifest, with marks where tensors are."""
    keys = {id(tensor): key for key, tensor in outgoing.tensors.items()}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, TensorToRead):
            return {"$tensor": keys[id(value)]}
        if isinstance(value, dict):
            return plain_tree.encode_items(
                [(k, encode(v, f"{path}.{k}")) for k, v in value.items()]
            )
        if isinstance(value, (list, tuple)):
            items = [encode(item, f"{path}.{i}") for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        return plain_tree.encode_scalar(value, path)

    return encode(dict(outgoing.state), "")


def _shards(tensors: Mapping[str, TensorToRead], limit: int) -> list[list[str]]:
    """Return the keys of each file, wide dtypes first: then all values are aligned."""
    files: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(key)
        size += tensor.nbytes
    return [sorted(keys, key=lambda key: -tensors[key].dtype.itemsize) for keys in files]


def _write_file(
    path: Path,
    tensors: Mapping[str, TensorToRead],
    progress: Callable[[int], None],
    done: int,
) -> int:
    """Write one file; return the bytes of tensors written so far, *done* of them before it."""
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        entries[key] = {
            "dtype": NAMES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.nbytes],
        }
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _HEADER_BYTES:
        raise CheckpointError(
            f"the header of {path.name} would have {len(header)} bytes, and readers of safetensors "
            f"take {_HEADER_BYTES}: give a smaller max_shard_size"
        )
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for values in _blocks(tensors.values()):
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
            done += values.nbytes
            progress(done)
        file.flush()
        os.fsync(file.fileno())
    return done


def _blocks(tensors: Iterable[TensorToRead]) -> Iterator[Tensor]:
    """Yield the values of all *tensors* in blocks of rows."""
    for tensor in tensors:
        if not tensor.nbytes:
            continue
        count = tensor.shape[0] if tensor.shape else 1
        rows = max(1, BLOCK_BYTES // (prod(tensor.shape[1:]) * tensor.dtype.itemsize))
        for start in range(0, count, rows):
            yield tensor.read_rows(start, min(start + rows, count)).contiguous()


def _write_json(path: Path, data: Any, *, indent: int | None = None) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(data, file, indent=indent, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
