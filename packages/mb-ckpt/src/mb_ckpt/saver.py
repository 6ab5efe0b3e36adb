# SPDX-License-Identifier: Apache-2.0
"""The background half of a save: write, agree with the other ranks, commit, prune."""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from attrs import frozen

from mb_ckpt.catalogue import step_name
from mb_ckpt.commit import RankReport, Row, commit, discard, prepare
from mb_ckpt.errors import CheckpointError, storage_error
from mb_ckpt.manifest import DataFile
from mb_ckpt.retention import Retention, prune
from mb_ckpt.tensorstore_io import Grid, encode_metadata, write_array

if TYPE_CHECKING:
    from mb_ckpt.interfaces import Store
    from mb_ckpt.ranks import Ranks
    from mb_ckpt.staging import Snapshot
    from mb_ckpt.state import Piece

_LOG = logging.getLogger("mb_ckpt")


class SaveHandle:
    """A save that may still be going on.

    Attributes:
        step: The step being saved.
        path: Where it will be.
    """

    def __init__(
        self, step: int, path: str, snapshot: Snapshot | None, future: Future[None]
    ) -> None:
        self.step = step
        self.path = path
        self._snapshot = snapshot
        self._future = future
        self.asked = False

    def wait_staged(self) -> None:
        """Return when the tensors may change without changing what is saved."""
        if self._snapshot is not None:
            self._snapshot.wait()

    def wait(self) -> None:
        """Return when the save is over, however it went."""
        wait([self._future])

    def done(self) -> bool:
        """Return whether the step is committed or has failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> None:
        """Return when the step is committed and durable.

        Args:
            timeout: Seconds to wait, None for as long as it takes.

        Raises:
            CheckpointError: If it was not saved; on every rank, whichever failed.
            TimeoutError: If it is still going on after *timeout*.
        """
        error = self._future.exception(timeout)
        self.asked = True
        if error is not None:
            raise error


@frozen(kw_only=True, eq=False)
class Job:
    """What the background thread needs of one save.

    Attributes:
        step: Optimizer steps done.
        tree: Plain data as JSON.
        snapshot: The bytes of this rank, None if they could not be staged.
        rows: What is in them.
        plain_keys: Keys of the plain tensors of this rank's state.
        error: Why they could not be staged, or empty.
    """

    step: int
    tree: Any = None
    snapshot: Snapshot | None = None
    rows: tuple[Row, ...] = ()
    plain_keys: tuple[str, ...] = ()
    error: str = ""


def table_rows(pieces: list[Piece], starts: list[int]) -> tuple[Row, ...]:
    """Return the chunk table of one rank's array."""
    rows: list[Row] = []
    for piece, first in zip(pieces, starts, strict=True):
        boxes, start, width = [], first, piece.data.element_size()
        for box in piece.boxes:
            boxes.append((start, box.offset, box.shape))
            start += box.volume * width
        rows.append((piece.key, piece.dtype, piece.shape, boxes))
    return tuple(rows)


def run(store: Store, ranks: Ranks, job: Job, retention: Retention) -> None:
    """Write *job* and commit it together with the other ranks; a collective call.

    Raises:
        CheckpointError: On every rank if any of them failed; then nothing is left of the step.
    """
    try:
        _run(store, ranks, job, retention)
    except CheckpointError as e:
        if ranks.rank == 0:  # every rank raises it; one says it, without a traceback
            _LOG.error("checkpoint of step %d failed: %s", job.step, e)
        raise


def _run(store: Store, ranks: Ranks, job: Job, retention: Retention) -> None:
    def begin() -> str:
        try:
            return prepare(store)
        except (OSError, ValueError) as e:
            raise storage_error(f"preparing step {job.step} in {store.url}", e) from e

    def finish() -> None:
        try:
            commit(store, job.step, data, job.tree, reports)
        except (OSError, ValueError) as e:
            discard(store, job.step, data)
            raise storage_error(f"committing step {job.step} in {store.url}", e) from e
        except BaseException:
            discard(store, job.step, data)
            raise

    data = ranks.from_first(begin)
    reports = ranks.gather(_write(store, ranks.rank, job, data))
    ranks.from_first(finish)
    if ranks.rank == 0:
        try:
            prune(store, retention, job.step)
        except (OSError, ValueError) as e:
            _LOG.warning("could not delete old steps in %s, will try again: %s", store.url, e)


def _write(store: Store, rank: int, job: Job, data: str) -> RankReport:
    """Write this rank's bytes; what goes wrong is in the report, for all to hear."""
    if job.snapshot is None:
        return RankReport(step=job.step, error=job.error)
    path = f"{step_name(job.step)}/{data}/rank_{rank:05d}"
    file = None
    try:
        job.snapshot.wait()
        if len(job.snapshot.data):
            file = _write_array(store, path, job.snapshot)
    except Exception as e:  # noqa: BLE001  # the other ranks are waiting to hear of it
        return RankReport(step=job.step, error=str(storage_error(f"writing {store.url}/{path}", e)))
    return RankReport(step=job.step, file=file, rows=job.rows, plain_keys=job.plain_keys)


def _write_array(store: Store, path: str, snapshot: Snapshot) -> DataFile:
    grid = Grid.of(len(snapshot.data))
    write_array(store.kvstore, path, snapshot.data, grid)
    # Last and by publish, which makes the directories durable as well.
    metadata = encode_metadata(grid)
    store.publish(f"{path}/zarr.json", metadata)
    return DataFile(
        path=path.rsplit("/", maxsplit=1)[1],
        grid=grid,
        sha256=hashlib.sha256(metadata).hexdigest(),
    )
