# SPDX-License-Identifier: Apache-2.0
"""From a step of a store to a folder of another format."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from mb_ckpt.errors import CheckpointError, storage_error
from mb_ckpt.interop.foreign import Outgoing, load_part
from mb_ckpt.interop.renaming import Renaming, move, without_tensors
from mb_ckpt.interop.stored_rows import StoredRows
from mb_ckpt.states import plain_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mb_ckpt.format.manifest import Manifest
    from mb_ckpt.interfaces import Store
    from mb_ckpt.interop.foreign import Format
    from mb_ckpt.states.storable import TensorToRead
    from mb_ckpt.store import CheckpointStore

_WRITERS = {
    "safetensors": "mb_ckpt.interop.safetensors_writer:write_safetensors",
    "dcp": "mb_ckpt.interop.dcp_writer:write_dcp",
    "torch_dist": "mb_ckpt.interop.torch_dist:write_torch_dist",
}


@frozen(kw_only=True)
class Exported:
    """What `export_checkpoint` has written.

    Attributes:
        step: Which step.
        path: The folder.
        format: Of what is in it.
        tensors: How many.
        nbytes: Of all tensors.
    """

    step: int
    path: str
    format: Format
    tensors: int
    nbytes: int


def export_checkpoint(
    store: CheckpointStore,
    destination: str | os.PathLike[str],
    *,
    to: Format,
    step: int | None = None,
    prefix: str = "",
    strip_prefix: str = "",
    rename: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Exported:
    """Write a step as a folder of another format; no value and no dtype changes.

    Every byte is checked against its checksum on the way. The folder appears when all of it is
    durable, and not at all if anything fails. Host memory is that of the largest tensor.

    Args:
        store: Where the step is.
        destination: The folder, which must not be there, or empty.
        to: Which format.
        step: Which step; None for the newest.
        prefix: Only what begins with this, plain data as well.
        strip_prefix: Taken off the beginning of dotted keys that have it.
        rename: Beginnings of keys, after *strip_prefix*, and what to put there; the longest that
            fits counts. Plain data go along.
        max_shard_size: Bytes of tensors in one file, such as ``"500MB"``; a larger tensor has a file
            of its own. Of safetensors alone; None for 5 GB.
        progress: Called with the bytes written so far, and all that will be.

    Raises:
        CheckpointError: If there is no such step, the destination holds something, the format cannot
            hold a tensor, a renaming fits nothing or makes two keys one, or writing fails.
        CorruptCheckpointError: If stored bytes are damaged; names tensor and file.
    """
    options = _options(to, max_shard_size)
    target = Path(destination).absolute()
    _check_free(target)
    place, manifest = store.find(step)
    renaming = Renaming(prefix=prefix, strip=strip_prefix, rename=dict(rename or {}))
    outgoing = _outgoing(place, manifest, renaming)
    folder = target.with_name(f".{target.name}.incomplete-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
        load_part(_WRITERS[to], to)(folder, outgoing, progress=progress, **options)
        folder.rename(target)
        _make_durable(target.parent)
    except BaseException as e:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, OSError):
            raise storage_error(f"writing {target}", e) from e
        raise
    return Exported(
        step=manifest.step,
        path=str(target),
        format=to,
        tensors=len(outgoing.tensors),
        nbytes=sum(tensor.nbytes for tensor in outgoing.tensors.values()),
    )


def _options(to: str, max_shard_size: int | str | None) -> dict[str, Any]:
    if to not in _WRITERS:
        raise CheckpointError(f"to={to!r}: expected {', '.join(map(repr, _WRITERS))}")
    if max_shard_size is None:
        return {}
    if to != "safetensors":
        raise CheckpointError(f"max_shard_size={max_shard_size!r} is of safetensors, not of {to}")
    return {"max_shard_size": max_shard_size}


def _outgoing(place: Store, manifest: Manifest, renaming: Renaming) -> Outgoing:
    names = renaming.new_names(manifest.tensors)
    rows = StoredRows(place, manifest, names)
    tensors = {key: rows.tensor(key) for key in names}
    state = move(plain_tree.decode(manifest.tree, _Kept(tensors)) or {}, renaming)
    return Outgoing(
        step=manifest.step,
        tensors={names[key]: tensor for key, tensor in tensors.items()},
        state=state,
        plain=without_tensors(state),
    )


class _Kept(dict[str, "TensorToRead"]):
    """Tensors by key; nothing stands for those that are not taken."""

    def __missing__(self, key: str) -> Any:
        return plain_tree.ABSENT


def _check_free(target: Path) -> None:
    if target.suffix == ".safetensors":
        raise CheckpointError(f"{target}: give the name of a folder; the files get theirs in it")
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise CheckpointError(
            f"{target} is there and no empty folder: give another destination, or remove it first"
        )


def _make_durable(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
