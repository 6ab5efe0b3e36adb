# SPDX-License-Identifier: Apache-2.0
"""The places a checkpoint can be kept in: a directory, an object store, memory of this process."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from attrs import field, frozen

from mb_ckpt.errors import CheckpointError
from mb_ckpt.format.tensorstore_io import delete, list_below, put
from mb_ckpt.places import claims

if TYPE_CHECKING:
    from mb_ckpt.interfaces import Claim, Store


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

    def tree(self) -> dict[str, list[str]]:
        """See `Store.tree`."""
        return {name: self.names(name) for name in self.names("") if (self.root / name).is_dir()}

    def files(self, path: str) -> list[str]:
        """See `Store.files`."""
        root = self.root / path
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())

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

    def settle(self, path: str) -> None:
        """See `Store.settle`."""
        for directory, _, _ in os.walk(self.root / path):
            _sync_directory(Path(directory))

    def remove(self, path: str) -> None:
        """See `Store.remove`."""
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        if target.parent.is_dir():
            _sync_directory(target.parent)

    def claim(self) -> Claim:
        """See `Store.claim`: an advisory lock on the directory, which the kernel takes back."""
        return claims.DirectoryClaim(self.root)


@frozen
class KeyStore:
    """Checkpoints under a common prefix of a key-value store, where a write is whole or not at all.

    Attributes:
        url: ``memory://name``, ``s3://bucket/prefix`` or ``gs://bucket/prefix``.
        kvstore: What tensorstore makes of it.
    """

    url: str
    kvstore: dict[str, Any]

    def names(self, path: str) -> list[str]:
        """See `Store.names`."""
        below = list_below(self.kvstore, f"{path}/" if path else "")
        return sorted({name.split("/", maxsplit=1)[0] for name in below})

    def tree(self) -> dict[str, list[str]]:
        """See `Store.tree`: one listing, instead of one a step."""
        found: dict[str, set[str]] = {}
        for name in list_below(self.kvstore, ""):
            head, *rest = name.split("/", maxsplit=2)
            if rest:
                found.setdefault(head, set()).add(rest[0])
        return {name: sorted(found[name]) for name in sorted(found)}

    def files(self, path: str) -> list[str]:
        """See `Store.files`."""
        return sorted(list_below(self.kvstore, f"{path}/"))

    def publish(self, path: str, data: bytes) -> None:
        """See `Store.publish`."""
        put(self.kvstore, path, data)

    def settle(self, path: str) -> None:
        """See `Store.settle`: there are no directories."""

    def remove(self, path: str) -> None:
        """See `Store.remove`."""
        delete(self.kvstore, path)

    def claim(self) -> Claim:
        """See `Store.claim`.

        Nothing tells whether another machine's writer is still alive, and a job that starts again
        after a crash must not wait for its own ghost. So the newest claim holds, and whoever held
        an older one finds out at its next save.
        """
        return claims.PrefixClaim(self.kvstore, self.url)


def open_store(url_or_path: str | os.PathLike[str]) -> Store:
    """Return the store at a path, ``file://``, ``memory://``, ``s3://`` or ``gs://`` URL.

    ``s3://bucket/prefix`` may end in ``?endpoint=...&region=...``; without, ``AWS_ENDPOINT_URL`` and
    ``AWS_REGION`` are used where set. Credentials come from where AWS and Google tools look.

    Raises:
        CheckpointError: If the scheme is another one, or the bucket is missing.
    """
    text = os.fspath(url_or_path)
    if "://" not in text:
        return FileStore(Path(text).expanduser().absolute())
    parts = urlsplit(text)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return FileStore(Path(unquote(parts.path)))
    path = f"{parts.path.strip('/')}/".removeprefix("/")
    if parts.scheme == "memory":
        return KeyStore(text, {"driver": "memory", "path": f"{parts.netloc}/{path}".lstrip("/")})
    if parts.scheme in ("s3", "gs") and parts.netloc:
        spec = {"driver": "gcs", "bucket": parts.netloc, "path": path}
        if parts.scheme == "s3":
            spec |= {"driver": "s3"} | _s3_options(parse_qs(parts.query))
        return KeyStore(text.split("?", maxsplit=1)[0] if parts.scheme == "gs" else text, spec)
    raise CheckpointError(
        f"checkpoint location {text!r} is not supported: give a path, file:///path, memory://name, "
        "s3://bucket/prefix or gs://bucket/prefix"
    )


def _s3_options(query: dict[str, list[str]]) -> dict[str, Any]:
    endpoint = query.get("endpoint", [os.environ.get("AWS_ENDPOINT_URL", "")])[0]
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "")
    region = query.get("region", [region])[0]
    options: dict[str, Any] = {}
    if endpoint:
        options["endpoint"] = endpoint
    if region or endpoint:
        options["aws_region"] = region or "us-east-1"
    if "AWS_ACCESS_KEY_ID" in os.environ:
        options["aws_credentials"] = {"type": "environment"}
    return options


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
