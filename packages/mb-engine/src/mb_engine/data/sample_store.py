# SPDX-License-Identifier: Apache-2.0
"""Prepared samples in a Parquet file, made anew when anything that they depend on changes.

A row of the file is what training reads at a time: a sample, or several packed into one row.
``input_ids`` list<int32> and ``loss_mask`` list<int8> are those of its samples one after the other,
``seq_start_id`` list<int32> says where each begins.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import field, frozen

from mb_engine.data import locations
from mb_engine.data.errors import DataError
from mb_engine.data.tokenizer_libraries import require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from mb_engine.data.sft import Sample

FORMAT = 1
"""Of the prepared files; another one is prepared anew."""
_ROWS = "samples.parquet"
_REPORT = "report.json"
_GROUP = 500  # rows of a row group


@frozen(kw_only=True, eq=False)
class SampleStore:
    """Samples in memory: 5 bytes a token.

    Attributes:
        ids: int32, of all samples one after the other.
        learnt: int8, 1 where an id counts for the loss.
        samples: int64 ``[N + 1]``: where in ``ids`` each sample begins, and the end.
        rows: int64 ``[R + 1]``: which sample each row begins with, and N.
        report: What was found while preparing.
    """

    ids: NDArray[np.int32] = field(repr=False)
    learnt: NDArray[np.int8] = field(repr=False)
    samples: NDArray[np.int64] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    report: Mapping[str, Any] = field(factory=dict)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows) - 1

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens that the model is given of each sample, int64 ``[N]``: its ids but one."""
        return np.diff(self.samples) - 1

    @classmethod
    def read(cls, folder: Path) -> SampleStore:
        """Return what *folder* holds.

        Raises:
            DataError: If it cannot be read.
        """
        require("pyarrow", setting="prepared data")
        import pyarrow as pa
        from pyarrow import parquet

        try:
            table = parquet.read_table(folder / _ROWS)
            report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"{folder} holds no readable prepared data ({str(error).splitlines()[0]}); remove"
                " the folder, and it is prepared anew"
            ) from error
        ids, row_ends = _flat(table.column("input_ids"))
        learnt, _ = _flat(table.column("loss_mask"))
        starts, row_samples = _flat(table.column("seq_start_id"))
        first = np.concatenate([[0], row_ends[:-1]]).astype(np.int64)
        begins = starts.astype(np.int64) + np.repeat(first, np.diff([0, *row_samples]))
        return cls(
            ids=ids,
            learnt=learnt,
            samples=np.append(begins, len(ids)),
            rows=np.concatenate([[0], row_samples]).astype(np.int64),
            report=report,
        )


def write_rows(
    folder: Path, samples: Sequence[Sample], rows: Sequence[NDArray[np.int64]], report: Any
) -> None:
    """Write *rows*, each some of *samples*, and *report* into *folder*."""
    require("pyarrow", setting="prepared data")
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"input_ids": pa.int32(), "loss_mask": pa.int8(), "seq_start_id": pa.int32()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
    with parquet.ParquetWriter(folder / _ROWS, schema, compression="zstd") as writer:
        for begin in range(0, len(rows), _GROUP):
            columns: dict[str, list[NDArray[Any]]] = {name: [] for name in kinds}
            for row in rows[begin : begin + _GROUP]:
                held = [samples[i] for i in row]
                sizes = [len(sample.ids) for sample in held]
                columns["input_ids"].append(np.concatenate([s.ids for s in held]))
                columns["loss_mask"].append(np.concatenate([s.learnt for s in held]))
                columns["seq_start_id"].append(np.cumsum([0, *sizes[:-1]]))
            arrays = [_lists(columns[name], kind) for name, kind in kinds.items()]
            writer.write_table(pa.table(arrays, schema=schema))
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / _REPORT).write_text(text, encoding="utf-8")


def prepared(cache: Path, depends_on: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """Return the folder of prepared data that was made from *depends_on*; makes it if it is missing.

    Processes that ask for the same at once wait for the one that makes it; what is made is complete
    or absent.

    Args:
        cache: Where such folders are.
        depends_on: Plain data; the folder's name has a hash of it.
        make: Fills the folder it is given.

    Raises:
        DataError: If the folder cannot be written.
    """
    text = json.dumps({"format": FORMAT, **depends_on}, sort_keys=True)
    name = "sft-" + hashlib.sha256(text.encode()).hexdigest()[:16]
    folder, unfinished = cache / name, cache / f"{name}.unfinished"
    if (folder / _REPORT).is_file():
        return folder
    with locked(cache, name):
        if (folder / _REPORT).is_file():
            return folder
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        make(unfinished)
        unfinished.rename(folder)
    return folder


def cache_folder(cache_dir: str | None, first: str) -> Path:
    """Return the folder for what is made from data whose first file is *first*.

    Raises:
        DataError: If that is in an object store and no folder is named.
    """
    if cache_dir is None and locations.is_remote(first):
        raise DataError(
            f"dataset.cache_dir is not set, and {first} has no folder of this machine beside it;"
            " name a folder that all ranks see"
        )
    return Path(cache_dir or Path(first).parent / ".mb-cache").expanduser()


def digests(paths: Sequence[str]) -> dict[str, str]:
    """Return a hash of the content of each of *paths*; in an object store, of its size and time.

    Raises:
        DataError: If one cannot be read.
    """
    found = {}
    for path in paths:
        digest = hashlib.blake2b(digest_size=16)
        try:
            if locations.is_remote(path):
                digest.update(repr(tuple(locations.stamp(path))).encode())
                found[path] = digest.hexdigest()
                continue
            with Path(path).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            from mb_engine.data.records import unreadable

            raise unreadable(path, error) from error
        found[path] = digest.hexdigest()
    return found


@contextlib.contextmanager
def locked(cache: Path, name: str) -> Iterator[None]:
    """Let one process at a time in, of all that name the same lock in the folder *cache*.

    Raises:
        DataError: If the folder cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{name}.lock").open("w")
    except OSError as error:
        raise DataError(
            f"prepared data cannot be written to {cache} ({error.strerror}); name another folder in"
            " dataset.cache_dir"
        ) from error
    with lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def _lists(rows: Sequence[NDArray[Any]], kind: Any) -> Any:
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    values = np.concatenate(rows).astype(kind.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _flat(column: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the values of a column of lists one after the other, and where each list ends."""
    values = [chunk.flatten().to_numpy() for chunk in column.chunks]
    sizes = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    return np.concatenate(values), np.cumsum(np.concatenate(sizes), dtype=np.int64)
