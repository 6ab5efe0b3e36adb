# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint of another format to a step of a store."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, field, frozen

from mb_ckpt.errors import CheckpointError
from mb_ckpt.interop import layers
from mb_ckpt.interop.foreign import load_part
from mb_ckpt.interop.renaming import Renaming, move, tensors_in
from mb_ckpt.states.storable import TensorToRead

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from mb_ckpt.interop.foreign import Format, Incoming
    from mb_ckpt.store import CheckpointStore

_READERS = {
    "safetensors": "mb_ckpt.interop.safetensors_shards:open_safetensors",
    "dcp": "mb_ckpt.interop.dcp:open_dcp",
    "torch_dist": "mb_ckpt.interop.torch_dist:open_torch_dist",
}
_RESOLVE = "mb_ckpt.interop.peer_folders:resolve"


@frozen(kw_only=True)
class Imported:
    """What `import_checkpoint` has stored.

    Attributes:
        step: Under which number.
        path: Where it is now.
        format: What it was read from.
        tensors: How many.
        nbytes: Of all tensors.
        left_out: What was not taken over, a line each with the reason.
    """

    step: int
    path: str
    format: Format
    tensors: int
    nbytes: int
    left_out: tuple[str, ...] = ()


@frozen(kw_only=True)
class _Found:
    """A checkpoint of another format, not opened yet."""

    format: Format
    path: Path
    step: int | None = None
    plain: Mapping[str, Any] = field(factory=dict)


def import_checkpoint(
    source: str | os.PathLike[str],
    store: CheckpointStore,
    *,
    format: Literal["auto", "safetensors", "dcp", "torch_dist"] = "auto",  # noqa: A002
    step: int | None = None,
    source_step: int | None = None,
    rename: Mapping[str, str] | None = None,
    prefix: str = "",
    add_prefix: str = "",
    split_layers: bool = False,
    allow_pickle: bool = False,
    replace: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Imported:
    """Store a checkpoint of another format as a step; no value and no dtype changes.

    Values are read while they are written, in the host memory of the largest tensor.

    Args:
        source: A ``.safetensors`` file, or a folder: with such files (and their index), with a
            checkpoint of ``torch.distributed.checkpoint`` or Megatron, or with several of the
            latter, such as ``iter_0000100``.
        store: Where to, of one rank; its layout and compression count. Its ``staging`` must be
            ``"eager"`` and its ``writer`` ``"thread"``.
        format: What *source* is, if looking at it does not tell.
        step: Number of the step; None for that of the source, or 0 if it does not say.
        source_step: Which of several in a folder; None for the newest.
        rename: Beginnings of dotted keys of the source, and what to put there; the longest that
            fits counts. Plain data go along.
        prefix: Only what begins with this, before it is renamed.
        add_prefix: Put before every key of a tensor, after renaming.
        split_layers: Of ``torch_dist``: one key a layer, as mb-engine has them, before any renaming.
        allow_pickle: Whether to take over pickles, which could run code, from a trusted source.
        replace: Whether a committed step of that number may be replaced.
        progress: Called with the bytes read so far, and all that will be, from another thread.

    Raises:
        CheckpointError: If *source* is no checkpoint of a known format or damaged, a renaming fits
            nothing or makes two keys one, the step is there, or it could not be stored.
    """
    found = _find(Path(source), format, source_step)
    incoming = _opened(found, split_layers=split_layers, allow_pickle=allow_pickle)
    number = next((n for n in (step, incoming.step, found.step) if n is not None), 0)
    if not replace:
        _check_free(store, number)
    renaming = Renaming(prefix=prefix, rename=dict(rename or {}), add=add_prefix)
    state = _renamed({**found.plain, **incoming.state}, renaming)
    tensors = tensors_in(state)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    (handle := store.save(number, _Counter(nbytes, progress).within(state))).result()
    progress(nbytes, nbytes)
    return Imported(
        step=number,
        path=handle.path,
        format=incoming.format,
        tensors=len(tensors),
        nbytes=nbytes,
        left_out=incoming.left_out,
    )


def _find(source: Path, wanted: str, source_step: int | None) -> _Found:
    if wanted != "auto" and wanted not in _READERS:
        raise CheckpointError(
            f"format={wanted!r}: expected 'auto', {', '.join(map(repr, _READERS))}"
        )
    if not source.exists():
        raise CheckpointError(f"{source} does not exist: give the path of a checkpoint")
    kind: Any = _kind(source) if wanted == "auto" else wanted
    if kind == "safetensors":
        if source_step is not None:
            raise CheckpointError(
                f"source_step={source_step}, but {source} is one checkpoint, not a folder of "
                "several: leave it out"
            )
        return _Found(format="safetensors", path=source)
    if not source.is_dir() or (kind is None and not _has_steps(source)):
        raise CheckpointError(_unknown(source))
    folder, step, plain = load_part(_RESOLVE, kind or "a folder of several checkpoints")(
        source, source_step
    )
    kind = _kind(folder) if wanted == "auto" else wanted
    if kind is None:
        raise CheckpointError(_unknown(folder))
    return _Found(format=kind, path=folder, step=step, plain=plain)


def _opened(found: _Found, *, split_layers: bool, allow_pickle: bool) -> Incoming:
    if split_layers and found.format != "torch_dist":
        raise CheckpointError(f"split_layers=True is of torch_dist, not of {found.format}")
    reader = load_part(_READERS[found.format], found.format)
    incoming: Incoming = reader(found.path, allow_pickle=allow_pickle)
    if split_layers:
        return evolve(incoming, state=layers.split_layers(incoming.state))
    return incoming


def _kind(path: Path) -> Any:
    """Return the format of *path*, or None."""
    if path.is_file():
        return "safetensors" if path.suffix == ".safetensors" else None
    if not (path / ".metadata").is_file():
        files = any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json"))
        return "safetensors" if files else None
    try:
        about = json.loads((path / "metadata.json").read_bytes())
    except FileNotFoundError:
        return "dcp"
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"{path / 'metadata.json'} cannot be read ({e}): name the format, 'dcp' or 'torch_dist'"
        ) from e
    backend = about.get("sharded_backend") if isinstance(about, dict) else None
    return "torch_dist" if backend == "torch_dist" else "dcp"


def _has_steps(folder: Path) -> bool:
    """Return whether *folder* looks like one with a checkpoint a step."""
    names = [path.name for path in folder.iterdir()]
    return any(name.startswith(("iter_", "latest_")) or name == "release" for name in names) or any(
        folder.glob("*/.metadata")
    )


def _unknown(path: Path) -> str:
    return (
        f"{path} is no checkpoint of a known format: looked for a .safetensors file, a folder with "
        "*.safetensors, one with .metadata (dcp; torch_dist if its metadata.json says so), and one "
        "with a checkpoint a step, such as iter_0000100"
    )


def _check_free(store: CheckpointStore, step: int) -> None:
    if step in store.steps():
        raise CheckpointError(
            f"step {step} is in {store.url} already: give another step=, or replace=True"
        )


def _renamed(state: dict[str, Any], renaming: Renaming) -> dict[str, Any]:
    renaming.new_names(tensors_in(state))  # refuses what does not fit
    return move(state, renaming)


class _Counter:
    """Counts the bytes that are read of the tensors of a state."""

    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        self._progress = progress

    def within(self, value: Any) -> Any:
        """Return *value* with tensors that are counted."""
        if isinstance(value, TensorToRead):
            return evolve(value, read_rows=lambda start, stop: self._read(value, start, stop))
        if isinstance(value, dict):
            return {key: self.within(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.within(item) for item in value])
        return value

    def _read(self, tensor: TensorToRead, start: int, stop: int) -> Tensor:
        rows = tensor.read_rows(start, stop)
        with self._lock:
            self._done += rows.nbytes
        self._progress(min(self._done, self._total), self._total)
        return rows
