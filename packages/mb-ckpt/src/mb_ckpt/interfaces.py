# SPDX-License-Identifier: Apache-2.0
"""What mb-ckpt asks of a place that keeps checkpoints; implementers match by shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class Claim(Protocol):
    """A writer's hold on a place."""

    def check(self) -> None:
        """Do nothing while the hold stands.

        Raises:
            CheckpointError: If another writer has taken the place over.
        """
        ...

    def release(self) -> None:
        """Let others in."""
        ...


class Store(Protocol):
    """A tree of files: names are relative to its root and separated by ``/``.

    Tensor data goes through tensorstore, with ``kvstore``; the methods are what a commit needs
    beside that.
    """

    @property
    def url(self) -> str:
        """The root, for messages and to open it again in another process."""
        ...

    @property
    def kvstore(self) -> Mapping[str, Any]:
        """The tensorstore key-value spec of the root; its ``"path"`` ends in ``/``."""
        ...

    def names(self, path: str) -> list[str]:
        """Return the names directly below *path*, sorted; empty where nothing is."""
        ...

    def tree(self) -> dict[str, list[str]]:
        """Return the directories directly below the root, each with the names directly below it."""
        ...

    def files(self, path: str) -> list[str]:
        """Return all files below the directory *path*, at any depth, relative to it."""
        ...

    def publish(self, path: str, data: bytes) -> None:
        """Put *data* at *path*, whole or not at all; it and its directories are durable on return.

        Raises:
            OSError: If the storage refuses; then whatever was at *path* is still there.
        """
        ...

    def settle(self, path: str) -> None:
        """Make all directories at and below *path* durable."""
        ...

    def remove(self, path: str) -> None:
        """Delete the file or the whole tree at *path*; nothing there is no error."""
        ...

    def claim(self) -> Claim:
        """Keep other writers out.

        Raises:
            CheckpointError: If another one is writing here.
        """
        ...
