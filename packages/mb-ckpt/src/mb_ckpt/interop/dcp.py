# SPDX-License-Identifier: Apache-2.0
"""Folders of ``torch.distributed.checkpoint`` (DCP), read through its own file layer.

DCP keeps no checksums: what cannot be read is refused, a flipped bit in a tensor is not noticed. Its
metadata and everything that is no tensor are pickles, which are read without running them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import torch
from attrs import define, field, frozen

from mb_ckpt.errors import CheckpointError
from mb_ckpt.interop.foreign import Incoming
from mb_ckpt.interop.restricted_pickle import LEFT_OUT, read_metadata, read_object, to_state
from mb_ckpt.states.boxes import Box
from mb_ckpt.states.storable import TensorToRead

if TYPE_CHECKING:
    import io
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.distributed.checkpoint.metadata import Metadata

_STEP = re.compile(r"(\d+)$")


def open_dcp(path: Path, *, allow_pickle: bool = False) -> Incoming:
    """Return what a folder that ``dcp.save`` wrote holds, nested as it was saved.

    Keys of an optimizer's ``state``, numbers that DCP makes strings of, are numbers again.

    Args:
        path: The folder.
        allow_pickle: Whether to run the pickles of what is no tensor, and keep what is nothing plain
            as a pickle; else only plain data are taken over.

    Raises:
        CheckpointError: If it is no such folder, or damaged.
    """
    files = DcpFiles.open(path)
    left_out: list[str] = []
    items: dict[tuple[Any, ...], Any] = {}
    places = files.metadata.planner_data or {}
    for key in files.metadata.state_dict_metadata:
        place = _place(places.get(key, (key,)), path)
        value: Any = files.tensor(key)
        if value is None:
            value = to_state(
                read_object(files.read_bytes(key), f"{path}, entry {key!r}", allow_pickle=allow_pickle),
                key,
                left_out,
                allow_pickle=allow_pickle,
            )  # fmt: skip
        if value is not LEFT_OUT:
            items[place] = value
    number = _STEP.search(path.name)
    return Incoming(
        format="dcp",
        path=str(path),
        step=None if number is None else int(number[1]),
        state=_nested(items),
        left_out=tuple(left_out),
    )


def _place(found: Any, path: Path) -> tuple[str | int, ...]:
    place = tuple(found)
    if not place or not all(type(name) in {str, int} for name in place):
        raise CheckpointError(f"{path / '.metadata'} is damaged: an entry is to be at {place!r}")
    return place


@frozen(eq=False)
class DcpFiles:
    """One folder, its metadata read.

    Attributes:
        path: The folder.
        metadata: As DCP has it.
    """

    path: Path
    metadata: Metadata
    _reader: Any = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> DcpFiles:
        """Read the metadata of the folder *path*.

        Raises:
            CheckpointError: If there is none, or it is damaged.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        try:
            metadata = read_metadata(path / ".metadata")
        except OSError as e:
            raise CheckpointError(
                f"{path / '.metadata'} cannot be read ({e.strerror}): give a folder that dcp.save wrote"
            ) from e
        reader = FileSystemReader(path)
        try:
            reader.set_up_storage_reader(metadata, is_coordinator=True)
        except (AssertionError, AttributeError) as e:
            raise CheckpointError(f"{path / '.metadata'} does not say where its data are") from e
        return cls(path, metadata, reader)

    def tensor(self, key: str) -> TensorToRead | None:
        """Return the tensor *key*, not read yet; None if it is no tensor."""
        entry: Any = self.metadata.state_dict_metadata[key]
        if not hasattr(entry, "chunks"):
            return None
        rows = _Rows(self, key, [_chunk(chunk) for chunk in entry.chunks])
        shape = tuple(entry.size)
        return TensorToRead(
            dtype=entry.properties.dtype,
            shape=shape,
            read_rows=lambda start, stop: rows.read(start, stop, shape, entry.properties.dtype),
        )

    def read_bytes(self, key: str) -> io.BytesIO:
        """Return the bytes of an entry that is no tensor."""
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import LoadItemType

        taker = _Taker()
        self._read(key, LoadItemType.BYTE_IO, MetadataIndex(key), Box((0,), (0,)), taker)
        return cast("io.BytesIO", taker.taken)

    def read_chunk(self, key: str, index: int, box: Box) -> Tensor:
        """Return the chunk of a tensor that covers *box*, the one number *index*.

        Raises:
            CheckpointError: If it is missing or damaged; names tensor and file.
        """
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import LoadItemType

        taker = _Taker(box.shape)
        where = MetadataIndex(key, torch.Size(box.offset), index)
        self._read(key, LoadItemType.TENSOR, where, box, taker)
        return cast("Tensor", taker.taken)

    def _read(self, key: str, kind: Any, where: Any, box: Box, taker: _Taker) -> None:
        from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

        zeros = torch.Size([0] * len(box.shape))
        item = ReadItem(
            type=kind,
            dest_index=where,
            dest_offsets=zeros,
            storage_index=where,
            storage_offsets=zeros,
            lengths=torch.Size(box.shape),
        )
        try:
            self._reader.read_data(LoadPlan([item]), taker).wait()
        except Exception as e:
            info = (self.metadata.storage_data or {}).get(where)
            file = self.path / getattr(info, "relative_path", "")
            raise CheckpointError(
                f"{file} is missing or damaged, it holds {key!r}: {type(e).__name__}: {e}"
            ) from e


class _Taker:
    """A load planner and the tensor it offers, in one: keeps what is read instead of copying it."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self._shape = torch.Size(shape)
        self.taken: Any = None

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:  # noqa: ARG002
        self.taken = value

    def resolve_tensor(self, read_item: Any) -> _Taker:  # noqa: ARG002
        return self

    def commit_tensor(self, read_item: Any, tensor: Any) -> None:
        """Do nothing: it is here."""

    def detach(self) -> _Taker:
        return self

    def size(self) -> torch.Size:
        return self._shape

    def copy_(self, tensor: Tensor) -> None:
        self.taken = tensor


@define(eq=False)
class _Rows:
    """Rows of one tensor out of its chunks; chunks are kept while rows of them may be asked for."""

    files: DcpFiles
    key: str
    boxes: list[Box]
    _kept: dict[int, Tensor] = field(factory=dict, init=False)

    def read(self, start: int, stop: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the rows ``start:stop``, asked for in increasing order."""
        if not shape:
            return self._chunk(0).reshape(())
        wanted = Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))
        for index in [i for i in self._kept if _end(self.boxes[i]) <= start]:
            del self._kept[index]
        found = [
            (i, common) for i, box in enumerate(self.boxes) if (common := wanted.intersect(box))
        ]
        if sum(common.volume for _, common in found) != wanted.volume:
            raise CheckpointError(
                f"{self.files.path / '.metadata'}: the chunks of {self.key!r} do not cover its rows "
                f"{start} to {stop}: the checkpoint is incomplete"
            )
        if len(found) == 1:
            index, _ = found[0]
            first = start - self.boxes[index].offset[0]
            rows = self._chunk(index)[first : first + stop - start]
        else:
            rows = torch.empty(wanted.shape, dtype=dtype)
            for index, common in found:
                here = _slices(common, wanted.offset)
                rows[here] = self._chunk(index)[_slices(common, self.boxes[index].offset)]
        for index in [i for i in self._kept if _end(self.boxes[i]) <= stop]:
            del self._kept[index]
        return rows

    def _chunk(self, index: int) -> Tensor:
        if index not in self._kept:
            self._kept[index] = self.files.read_chunk(self.key, index, self.boxes[index])
        return self._kept[index]


def _chunk(chunk: Any) -> Box:
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _end(box: Box) -> int:
    return box.offset[0] + box.shape[0] if box.shape else 0


def _slices(box: Box, origin: Iterable[int]) -> tuple[slice, ...]:
    return tuple(
        slice(o - a, o - a + n) for o, a, n in zip(box.offset, origin, box.shape, strict=True)
    )


def _nested(items: Mapping[tuple[Any, ...], Any]) -> dict[str, Any]:
    """Return a nested state: steps of a place that are numbers make lists, others mappings."""
    root: dict[Any, Any] = {}
    for place, value in items.items():
        at = root
        for name in place[:-1]:
            at = at.setdefault(name, {})
            if not isinstance(at, dict):
                raise CheckpointError(f"entry {place} is below another entry, {name!r}")
        at[place[-1]] = value
    return cast("dict[str, Any]", _with_lists(root))


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    out = {key: _with_lists(item) for key, item in value.items()}
    if out and all(isinstance(key, int) for key in out):
        ordered = sorted(out)
        return [out[i] for i in ordered] if ordered == list(range(len(out))) else out
    state = out.get("state")
    if isinstance(state, dict) and "param_groups" in out and all(map(_is_number, state)):
        out["state"] = {int(key): item for key, item in state.items()}
    return out


def _is_number(key: Any) -> bool:
    return isinstance(key, str) and key.isdecimal()
