# SPDX-License-Identifier: Apache-2.0
"""The manifest of one step: what is stored and where. Its presence makes the step exist.

``manifest.json`` is one line of JSON with fixed beginning and end::

    {"format":"mb-ckpt","format_version":1,"sha256":"<of BODY>","body":BODY}

and a newline. The digest covers the bytes of BODY as they stand in the file, so that a flipped bit
anywhere is noticed. A reader refuses a ``format_version`` above its own; the first two fields stay
where they are in every version. What BODY holds is in ``docs/checkpointing.md``.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from attrs import asdict, field, frozen

from mb_ckpt.errors import CheckpointError, CorruptCheckpointError
from mb_ckpt.tensorstore_io import Grid

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_START = re.compile(rb'\{"format":"mb-ckpt","format_version":(\d+),')
_HEAD = re.compile(rb'\{"format":"mb-ckpt","format_version":\d+,"sha256":"([0-9a-f]{64})","body":')
_TAIL = b"}\n"

Chunk = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Index of the file, first byte in it, offset and shape of the box in the global tensor."""


@frozen(kw_only=True)
class DataFile:
    """One rank's packed array.

    Attributes:
        path: Below the step's data directory, such as ``"rank_00000"``.
        grid: How the array is cut.
        sha256: Of its ``zarr.json``.
    """

    path: str
    grid: Grid
    sha256: str


@frozen(kw_only=True)
class TensorEntry:
    """One global tensor.

    Attributes:
        dtype: As torch prints it, without the prefix.
        shape: Of the whole tensor.
        chunks: Row-major pieces that tile it.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...] = field(repr=False)


@frozen(kw_only=True)
class Manifest:
    """One committed step.

    Attributes:
        step: Optimizer steps done.
        data: Name of the directory beside the manifest that holds the arrays.
        files: The arrays, one for each rank that stored something.
        tensors: By key.
        tree: Plain data, as `mb_ckpt.plain_tree` says.
        world_size: Ranks that wrote it.
        created: Time of the commit, ISO 8601, UTC.
        versions: Of the software that wrote it.
    """

    step: int
    data: str
    files: tuple[DataFile, ...]
    tensors: dict[str, TensorEntry]
    tree: Any
    world_size: int
    created: str
    versions: dict[str, str]


def encode(manifest: Manifest) -> bytes:
    """Return the content of ``manifest.json``."""
    body = {
        "step": manifest.step,
        "layout": "packed",
        "data": manifest.data,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "versions": manifest.versions,
        "files": [asdict(file) for file in manifest.files],
        "tensors": {
            key: {"dtype": t.dtype, "shape": t.shape, "chunks": t.chunks}
            for key, t in manifest.tensors.items()
        },
        "tree": manifest.tree,
    }
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    digest = hashlib.sha256(text).hexdigest()
    head = f'{{"format":"mb-ckpt","format_version":{FORMAT_VERSION},"sha256":"{digest}","body":'
    return head.encode() + text + _TAIL


class NewerFormatError(CheckpointError):
    """The step was written in a format this version does not know."""


def check(raw: bytes, where: str) -> bytes:
    """Return the bytes of BODY in *raw*.

    Raises:
        NewerFormatError: If a newer version of mb-ckpt wrote it.
        CorruptCheckpointError: If it is not, byte for byte, what was written; names *where*.
    """
    start = _START.match(raw)
    if start and int(start[1]) > FORMAT_VERSION:
        raise NewerFormatError(
            f"{where} has format_version={int(start[1])}, this mb-ckpt reads up to "
            f"{FORMAT_VERSION}: upgrade mb-ckpt"
        )
    head = _HEAD.match(raw)
    body = raw[head.end() : -len(_TAIL)] if head else b""
    if (
        start is None
        or head is None
        or int(start[1]) != FORMAT_VERSION
        or not raw.endswith(_TAIL)
        or hashlib.sha256(body).hexdigest() != head[1].decode()
    ):
        raise CorruptCheckpointError(
            f"{where} is corrupt (its checksum does not match): load another step, or remove it"
        )
    return body


def decode(raw: bytes, where: str) -> Manifest:
    """Return the manifest in *raw*; raises as `check`."""
    return _from_body(json.loads(check(raw, where)))


def _from_body(body: dict[str, Any]) -> Manifest:
    return Manifest(
        step=body["step"],
        data=body["data"],
        files=tuple(
            DataFile(path=file["path"], grid=Grid(**file["grid"]), sha256=file["sha256"])
            for file in body["files"]
        ),
        tensors={
            key: TensorEntry(
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                chunks=tuple((f, s, tuple(o), tuple(n)) for f, s, o, n in entry["chunks"]),
            )
            for key, entry in body["tensors"].items()
        },
        tree=body["tree"],
        world_size=body["world_size"],
        created=body["created"],
        versions=body["versions"],
    )
