# SPDX-License-Identifier: Apache-2.0
"""The context and the plain files of tensorstore: what every layout and place goes through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

if TYPE_CHECKING:
    from collections.abc import Mapping

Bytes = npt.NDArray[np.uint8]

_RETRIES = {"max_retries": 7, "initial_delay": "250ms", "max_delay": "8s"}

# One context for the process: two stores of one memory:// name see the same data. Requests to
# object stores are tried again with growing pauses for about half a minute.
CONTEXT = ts.Context({"s3_request_retries": _RETRIES, "gcs_request_retries": _RETRIES})


def below(kvstore: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the spec of the directory *path* of *kvstore*."""
    return {**kvstore, "path": f"{kvstore['path']}{path}/"}


def start_read(array: Any, where: Any, out: Any) -> Any:
    """Begin reading ``array[where]`` into the numpy array *out*; ``.result()`` waits for it."""
    source = array[where].translate_to[(0,) * out.ndim]
    return ts.array(out, copy=False, context=CONTEXT).write(source)


def get(kvstore: Mapping[str, Any], path: str) -> bytes | None:
    """Return the file at *path*, or None where there is none."""
    result = _open(kvstore).read(path).result()
    return bytes(result.value) if result.state == "value" else None


def put(kvstore: Mapping[str, Any], path: str, data: bytes) -> None:
    """Write the file at *path*."""
    _open(kvstore).write(path, data).result()


def start_put(kvstore: Mapping[str, Any], path: str, data: bytes) -> Any:
    """Begin to write the file at *path*; ``.result()`` waits for it."""
    return _open(kvstore).write(path, data)


def delete(kvstore: Mapping[str, Any], path: str) -> None:
    """Delete the file at *path* and everything below it."""
    store = _open(kvstore)
    store.delete_range(ts.KvStore.KeyRange(f"{path}/", f"{path}0")).result()
    store.write(path, None).result()


def list_below(kvstore: Mapping[str, Any], prefix: str) -> list[str]:
    """Return all names that begin with *prefix*, without it."""
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
    names = _open(kvstore).list(ts.KvStore.KeyRange(prefix, end)).result()
    return [name.decode()[len(prefix) :] for name in names]


def _open(kvstore: Mapping[str, Any]) -> Any:
    return ts.KvStore.open(dict(kvstore), context=CONTEXT).result()
