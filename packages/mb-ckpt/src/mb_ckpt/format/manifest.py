# SPDX-License-Identifier: Apache-2.0
"""The manifest of one step: what is stored and where. Its presence makes the step exist.

``manifest.json`` is one line of JSON with fixed beginning and end::

    {"format":"mb-ckpt","format_version":1,"sha256":"<of BODY>","body":BODY}

and a newline. The digest covers the bytes of BODY as they stand in the file, so that a flipped bit
anywhere is noticed. A reader refuses a ``format_version`` above its own; the first two fields stay
where they are in every version. What BODY holds is in ``docs/checkpoint-format.md``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import define, field, frozen

from mb_ckpt.errors import CheckpointError, CorruptCheckpointError
from mb_ckpt.format.packed import Grid
from mb_ckpt.states import plain_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        chunks: Row-major pieces that tile it, in layout ``packed``; empty in ``zarr``.
        chunk_shape: Of a chunk of its own array, in layout ``zarr``; None in ``packed``.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...] = field(default=(), repr=False)
    chunk_shape: tuple[int, ...] | None = None


@define
class TensorTable(Mapping[str, TensorEntry]):
    """The tensors of a step by key, decoded one by one as they are asked for.

    A row is ``[dtype, shape, file, start]`` for a tensor in one piece, ``[dtype, shape, chunks]``
    for one in several, and ``[dtype, shape, null, chunk_shape]`` in layout ``zarr``; ``dtype`` is an
    index into ``dtypes``.
    """

    dtypes: list[str]
    rows: dict[str, list[Any]]

    def __getitem__(self, key: str) -> TensorEntry:
        row = self.rows[key]
        dtype, shape = self.dtypes[row[0]], tuple(row[1])
        if len(row) == 3:
            chunks = tuple((f, s, tuple(o), tuple(n)) for f, s, o, n in row[2])
            return TensorEntry(dtype=dtype, shape=shape, chunks=chunks)
        if row[2] is None:
            return TensorEntry(dtype=dtype, shape=shape, chunk_shape=tuple(row[3]))
        chunk = (row[2], row[3], (0,) * len(shape), shape)
        return TensorEntry(dtype=dtype, shape=shape, chunks=(chunk,))

    def kind(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of *key*."""
        row = self.rows[key]
        return self.dtypes[row[0]], tuple(row[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, key: object) -> bool:
        return key in self.rows


def make_table(tensors: Mapping[str, TensorEntry]) -> TensorTable:
    """Return *tensors* as rows."""
    dtypes = sorted({entry.dtype for entry in tensors.values()})
    number = {dtype: i for i, dtype in enumerate(dtypes)}
    rows: dict[str, list[Any]] = {}
    for key, entry in tensors.items():
        row: list[Any] = [number[entry.dtype], list(entry.shape)]
        if entry.chunk_shape is not None:
            row += [None, list(entry.chunk_shape)]
        elif len(entry.chunks) == 1 and entry.chunks[0][3] == entry.shape:
            row += entry.chunks[0][:2]
        else:
            row.append([[f, s, list(o), list(n)] for f, s, o, n in entry.chunks])
        rows[key] = row
    return TensorTable(dtypes, rows)


@frozen(kw_only=True)
class Manifest:
    """One committed step.

    Attributes:
        step: Optimizer steps done.
        layout: ``"packed"`` or ``"zarr"``.
        compression: Level of zstd, None for none.
        data: Name of the directory beside the manifest that holds the arrays.
        files: The arrays, one for each rank that stored something; none in layout ``zarr``.
        tensors: By key.
        tree: Plain data, as `mb_ckpt.states.plain_tree` says.
        metrics: Numbers that retention may go by.
        world_size: Ranks that wrote it.
        created: Time of the commit, ISO 8601, UTC.
        versions: Of the software that wrote it.
    """

    step: int
    layout: Literal["packed", "zarr"] = "packed"
    compression: int | None = None
    data: str
    files: tuple[DataFile, ...]
    tensors: TensorTable
    tree: Any
    metrics: dict[str, float] = field(factory=dict)
    world_size: int
    created: str
    versions: dict[str, str]


def encode_table(table: TensorTable) -> str:
    """Return *table* as JSON; it depends on the plan alone, so a store encodes it once."""
    return _json({"dtypes": table.dtypes, "rows": table.rows})


def encode(manifest: Manifest, table: str | None = None) -> bytes:
    """Return the content of ``manifest.json``.

    Args:
        manifest: What to write.
        table: Its tensors as `encode_table` returned them, if that has been done already.
    """
    files = [
        {"path": f.path, "nbytes": f.grid.nbytes, "inner": f.grid.inner, "shard": f.grid.shard,
         "sha256": f.sha256} for f in manifest.files
    ]  # fmt: skip
    head = {
        "step": manifest.step,
        "layout": manifest.layout,
        "compression": manifest.compression,
        "data": manifest.data,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "versions": manifest.versions,
        "metrics": {k: plain_tree.encode_scalar(v, k) for k, v in manifest.metrics.items()},
        "files": files,
        "tree": manifest.tree,
    }
    tensors = encode_table(manifest.tensors) if table is None else table
    text = f'{_json(head)[:-1]},"tensors":{tensors}}}'.encode()
    digest = hashlib.sha256(text).hexdigest()
    start = f'{{"format":"mb-ckpt","format_version":{FORMAT_VERSION},"sha256":"{digest}","body":'
    return b"".join((start.encode(), text, _TAIL))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


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
    body = json.loads(check(raw, where))
    return Manifest(
        step=body["step"],
        layout=body["layout"],
        compression=body["compression"],
        data=body["data"],
        files=tuple(
            DataFile(
                path=file["path"],
                grid=Grid(file["nbytes"], file["inner"], file["shard"], body["compression"]),
                sha256=file["sha256"],
            )
            for file in body["files"]
        ),
        tensors=TensorTable(body["tensors"]["dtypes"], body["tensors"]["rows"]),
        tree=body["tree"],
        metrics={k: plain_tree.decode(v) for k, v in body["metrics"].items()},
        world_size=body["world_size"],
        created=body["created"],
        versions=body["versions"],
    )
