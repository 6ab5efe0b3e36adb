# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of safetensors: one file, or shards with an index, as Hugging Face has them.

What safetensors cannot hold, the step and the plain data, is in ``mb_ckpt_plain.json`` beside the
files: ``{"format": 1, "step": n, "tree": ...}``, the tree as in a manifest.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mb_ckpt.errors import CheckpointError
from mb_ckpt.interop.foreign import Incoming
from mb_ckpt.loading.packed_reader import listing
from mb_ckpt.states import plain_tree
from mb_ckpt.states.storable import TensorToRead

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

PLAIN = "mb_ckpt_plain.json"
SINGLE = "model.safetensors"
FORMAT = 1
"""Of `PLAIN`."""
METADATA = "__metadata__"
"""What headers hold beside tensors."""
_MAPPED_BYTES = 32 << 20
"""After so many bytes read, the file is mapped anew, or its pages would pile up."""
NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32",
    "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""What the format calls torch's dtypes."""
_DTYPES = {name: getattr(torch, dtype) for dtype, name in NAMES.items() if hasattr(torch, dtype)}


def open_safetensors(path: Path, *, allow_pickle: bool = False) -> Incoming:
    """Open a ``.safetensors`` file, or a folder with one or with shards and their index.

    Tensors are at the top of the state under their keys, and metadata of the headers under
    ``__metadata__``; a folder that `write_safetensors` wrote gives back the state that was exported.

    Args:
        path: Of the file or folder.
        allow_pickle: Whether to take over pickles among plain data; they are not run.

    Raises:
        CheckpointError: If a file is missing, damaged or of unknown dtypes, index and files do not
            agree, or the safetensors library is not there.
    """
    files, index, left_out = _files(path)
    reader = _Reader()
    tensors: dict[str, TensorToRead] = {}
    owners: dict[str, Path] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in files:
        handle = reader.open(file)
        for key in handle.keys():  # noqa: SIM118  # it is no mapping
            if key in owners:
                raise CheckpointError(
                    f"tensor {key!r} is in {owners[key]} and in {file.name}: import one of them"
                )
            owners[key] = file
            if index is None or index.get(key) == file.name:
                tensors[key] = _tensor(reader, handle, file, key)
            elif key in index:
                raise CheckpointError(
                    f"tensor {key!r} is in {file}, but the index says {index[key]}: the "
                    "files are not of one checkpoint"
                )
            else:
                left_out.append(f"{key}: in {file.name}, but the index does not name it")
        metadata[file.name] = dict(handle.metadata() or {})
    for key, name in (index or {}).items():
        if key not in tensors:
            raise CheckpointError(
                f"tensor {key!r} is not in {path / name}, where the index says it is: fetch the "
                "files of one checkpoint again"
            )
    folder = path if path.is_dir() else path.parent
    step, state = None, _with_metadata(tensors, metadata)
    if (folder / PLAIN).is_file() and files[0].name.startswith("model"):
        step, state = _plain(folder / PLAIN, tensors, allow_pickle=allow_pickle)
    return Incoming(
        format="safetensors", path=str(path), step=step, state=state, left_out=tuple(left_out)
    )


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None, list[str]]:
    """Return the files to read, the index if there is one, and what of the folder is left out."""
    if path.is_file():
        return [path], None, []
    indices = sorted(path.glob("*.safetensors.index.json"))
    present = sorted(path.glob("*.safetensors"))
    if len(indices) > 1:
        names = ", ".join(file.name for file in indices)
        raise CheckpointError(f"{path} has several indices ({names}): import from a folder of one")
    index = None
    if indices:
        index = _index(indices[0])
        files = [path / name for name in sorted(set(index.values()))]
        for file in files:
            if not file.is_file():
                raise CheckpointError(
                    f"{file} is missing, and {indices[0].name} names it: fetch it again"
                )
    elif path / SINGLE in present:
        files = [path / SINGLE]
    else:
        files = present
        _check_complete(files)
    if not files:
        raise CheckpointError(f"{path} has no *.safetensors: give the folder or file that has")
    others = [file.name for file in present if file not in files]
    return files, index, [f"{name}: not one of the files of {files[0].name}" for name in others]


def _index(path: Path) -> dict[str, str]:
    """Return in which file of the folder each tensor is."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        for key, value in items:
            if found[key] != value:
                raise CheckpointError(
                    f"{path} names {key!r} twice, in {value} and {found[key]}: the index is damaged"
                )
        return found

    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=pairs)
        files = {key: str(name) for key, name in found["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} cannot be read: expected JSON with 'weight_map', from tensor to file "
            f"({type(e).__name__}: {e})"
        ) from e
    for key, name in files.items():
        if name in ("", ".", "..") or set(name) & {"/", "\\"}:
            raise CheckpointError(f"{path} has {key!r} in {name!r}: expected a file beside it")
    return files


def _check_complete(files: list[Path]) -> None:
    """Refuse shards without an index if their names tell of more than there are."""
    groups: dict[tuple[str, int], int] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", file.name):
            group = (match[1], int(match[2]))
            groups[group] = groups.get(group, 0) + 1
    for (name, count), present in groups.items():
        if present != count:
            raise CheckpointError(
                f"{files[0].parent} has {present} of {count} files {name}-...: fetch the others"
            )


def _tensor(reader: _Reader, handle: Any, file: Path, key: str) -> TensorToRead:
    piece = handle.get_slice(key)
    name, shape = piece.get_dtype(), tuple(piece.get_shape())
    if name not in _DTYPES:
        raise CheckpointError(
            f"tensor {key!r} of {file} is {name}, which cannot be stored: leave it out of the file"
        )
    read = partial(reader.rows, file, key)
    return TensorToRead(dtype=_DTYPES[name], shape=shape, read_rows=read)


class _Reader:
    """Reads rows out of one file at a time."""

    def __init__(self) -> None:
        try:
            from safetensors import safe_open
        except ImportError as e:
            raise CheckpointError(
                "reading safetensors needs its library: pip install 'mb-ckpt[safetensors]'"
            ) from e
        self._safe_open = safe_open
        self._file: Path | None = None
        self._handle: Any = None
        self._read = 0

    def open(self, file: Path) -> Any:
        """Return the opened *file*; an earlier one is let go.

        Raises:
            CheckpointError: If it is no whole safetensors file.
        """
        self._handle = self._file = None
        try:
            self._handle = self._safe_open(file, framework="pt")
        except Exception as e:  # the library's error has no base but Exception
            raise CheckpointError(
                f"{file} is no whole safetensors file: copy it again ({e})"
            ) from e
        self._file, self._read = file, 0
        return self._handle

    def rows(self, file: Path, key: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor; of one without dimensions all."""
        if file != self._file or self._read >= _MAPPED_BYTES:
            self.open(file)
        piece = self._handle.get_slice(key)
        found: Tensor = piece[start:stop] if piece.get_shape() else self._handle.get_tensor(key)
        self._read += found.nbytes
        return found


def _with_metadata(
    tensors: Mapping[str, TensorToRead], metadata: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """Return the state: what headers say once if all say the same, else by file."""
    first = next(iter(metadata.values()))
    same = all(one == first for one in metadata.values())
    about: Mapping[str, Any] = first if same else metadata
    return {**tensors, METADATA: about} if about else dict(tensors)


def _plain(
    path: Path, tensors: dict[str, TensorToRead], *, allow_pickle: bool
) -> tuple[int, dict[str, Any]]:
    """Return the step, and the plain data with the tensors in their places."""
    try:
        found = json.loads(path.read_bytes())
        version, step, tree = found["format"], found["step"], found["tree"]
        if version != FORMAT:
            raise CheckpointError(
                f"{path} has format {version}, this mb-ckpt reads {FORMAT}: use a newer one"
            )
        lacking = set(plain_tree.tensor_keys(tree)) - tensors.keys()
        if lacking:
            raise CheckpointError(
                f"{path} tells of tensor {min(lacking)!r}, which the files lack: export again"
            )
        if (pickles := plain_tree.pickled(tree)) and not allow_pickle:
            raise CheckpointError(
                f"{path} holds pickles ({listing(list(pickles))}), which can run anything when they "
                "are loaded: where you trust who wrote it, allow pickles"
            )
        state = plain_tree.decode(tree, tensors)
        rest = {key: tensors[key] for key in tensors.keys() - set(plain_tree.tensor_keys(tree))}
        clash = state.keys() & rest.keys()
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise CheckpointError(
            f"{path} cannot be read ({type(e).__name__}: {e}): export again, or remove it to import "
            "tensors alone"
        ) from e
    if clash:
        raise CheckpointError(
            f"{path} has plain data {min(clash)!r}, the name of a tensor: rename it at export"
        )
    return int(step), {**state, **{key: rest[key] for key in tensors if key in rest}}
