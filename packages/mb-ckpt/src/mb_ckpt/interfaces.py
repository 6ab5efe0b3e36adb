# SPDX-License-Identifier: Apache-2.0
"""What mb-ckpt asks of a place that keeps checkpoints; implementers match by shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class Store(Protocol):
    """A tree of files: names are relative to its root and separated by ``/``.

    Tensor data goes through tensorstore, with ``kvstore``; the three methods are what a commit
    needs beside that.
    """

    @property
    def url(self) -> str:
        """The root, for messages."""
        ...

    @property
    def kvstore(self) -> Mapping[str, Any]:
        """The tensorstore key-value spec of the root; its ``"path"`` ends in ``/``."""
        ...

    def names(self, path: str) -> list[str]:
        """Return the names directly below *path*, sorted; empty where nothing is."""
        ...

    def publish(self, path: str, data: bytes) -> None:
        """Put *data* at *path*, whole or not at all; it and its directories are durable on return.

        Raises:
            OSError: If the storage refuses; then whatever was at *path* is still there.
        """
        ...

    def remove(self, path: str) -> None:
        """Delete the file or the whole tree at *path*; nothing there is no error."""
        ...
