# SPDX-License-Identifier: Apache-2.0
"""The places a checkpoint can be kept in: a directory, or memory of this process."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from attrs import field, frozen

from mb_ckpt.errors import CheckpointError
from mb_ckpt.tensorstore_io import delete, list_below, put

if TYPE_CHECKING:
    from mb_ckpt.interfaces import Store


@frozen
class FileStore:
    """Checkpoints below one directory, made durable with fsync and atomic with rename."""

    root: Path
    url: str = field(init=False)
    kvstore: dict[str, Any] = field(init=False)

    @url.default
    def _url(self) -> str:
        return str(self.root)

    @kvstore.default
    def _kvstore(self) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self.root}/"}

    def names(self, path: str) -> list[str]:
        """See `Store.names`."""
        try:
            return sorted(entry.name for entry in (self.root / path).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def publish(self, path: str, data: bytes) -> None:
        """See `Store.publish`: temporary file, fsync, rename, fsync of every directory above."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        for directory in target.parents:
            _sync_directory(directory)
            if directory == self.root:
                break
        with suppress(PermissionError):  # one may write in a directory without reading its parent
            _sync_directory(self.root.parent)

    def remove(self, path: str) -> None:
        """See `Store.remove`."""
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        if target.parent.is_dir():
            _sync_directory(target.parent)


@frozen
class MemoryStore:
    """Checkpoints in the memory of this process, under a name; for tests and notebooks."""

    url: str
    kvstore: dict[str, Any] = field(init=False)

    @kvstore.default
    def _kvstore(self) -> dict[str, Any]:
        name = self.url.removeprefix("memory://").strip("/")
        return {"driver": "memory", "path": f"{name}/"}

    def names(self, path: str) -> list[str]:
        """See `Store.names`."""
        below = list_below(self.kvstore, f"{path}/" if path else "")
        return sorted({name.split("/", maxsplit=1)[0] for name in below})

    def publish(self, path: str, data: bytes) -> None:
        """See `Store.publish`."""
        put(self.kvstore, path, data)

    def remove(self, path: str) -> None:
        """See `Store.remove`."""
        delete(self.kvstore, path)


def open_store(url_or_path: str | os.PathLike[str]) -> Store:
    """Return the store at a path, ``file:///path`` or ``memory://name``.

    Raises:
        CheckpointError: If the scheme is another one.
    """
    text = os.fspath(url_or_path)
    if "://" not in text:
        return FileStore(Path(text).expanduser().absolute())
    parts = urlsplit(text)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "memory":
        return MemoryStore(text)
    raise CheckpointError(
        f"checkpoint location {text!r} is not supported: give a path, file:///path or memory://name"
    )


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
