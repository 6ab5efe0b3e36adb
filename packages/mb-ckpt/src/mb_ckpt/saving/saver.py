# SPDX-License-Identifier: Apache-2.0
"""The background half of a save: stage, write, agree with the other ranks, commit, prune."""

from __future__ import annotations

import logging
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen

from mb_ckpt.collector import paused
from mb_ckpt.errors import CheckpointError, storage_error
from mb_ckpt.format.manifest import DataFile, Manifest
from mb_ckpt.format.packed import Grid
from mb_ckpt.places.catalogue import step_name
from mb_ckpt.places.commit import RankReport, commit, discard, now, prepare, versions
from mb_ckpt.places.retention import Retention, prune
from mb_ckpt.saving import writing
from mb_ckpt.saving.recipes import Layout, Recipe, make_recipe, packed_task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mb_ckpt.interfaces import Claim, Store
    from mb_ckpt.places.replication import Replicator
    from mb_ckpt.ranks import Ranks
    from mb_ckpt.saving.planning import Share
    from mb_ckpt.saving.staging import Snapshot
    from mb_ckpt.saving.writer_process import WriterProcess
    from mb_ckpt.saving.writing import Task

_LOG = logging.getLogger("mb_ckpt")


class SaveHandle:
    """A save that may still be going on.

    Attributes:
        step: The step being saved.
        path: Where it will be.
    """

    def __init__(
        self,
        step: int,
        path: str,
        future: Future[Future[bool] | None],
        staged: Callable[[], None] | None = None,
    ) -> None:
        self.step = step
        self.path = path
        self._staged = staged
        self._future = future
        self.asked = False

    def wait_staged(self) -> None:
        """Return when the tensors may change without changing what is saved."""
        if self._staged is not None:
            self._staged()

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

    def replicated(self, timeout: float | None = None) -> bool:
        """Return when the step is durable in the second place, too.

        Args:
            timeout: Seconds to wait for each of the two places, None for as long as it takes.

        Returns:
            Whether it is there; False without a second place, or if a newer step went first.

        Raises:
            CheckpointError: If it was not saved, or could not be copied.
            TimeoutError: If either is still going on after *timeout*.
        """
        self.result(timeout)
        copying = self._future.result()
        if copying is None:
            return False
        return copying.result(timeout)


@frozen(kw_only=True, eq=False)
class Job:
    """What the background thread needs of one save.

    Attributes:
        step: Optimizer steps done.
        tree: Plain data as JSON; rank 0's counts.
        metrics: Numbers for retention.
        agree: Returns this rank's share; a collective call that raises on all ranks or none.
        stage: Copies what the share says, if that has not been done.
        let_go: Called when no tensor is needed any more, however it went.
    """

    step: int
    tree: Any
    metrics: dict[str, float]
    agree: Callable[[], Share]
    stage: Callable[[Share], Snapshot]
    let_go: Callable[[], None]


@define(kw_only=True, eq=False)
class Saver:
    """Carries out the saves of one store, one after the other, on one thread.

    Attributes:
        store: Where to.
        ranks: Those that save together; only this thread talks over them.
        retention: What to keep.
        layout: How tensors lie in files.
        compression: Level of zstd, None for none.
        process: Writes in place of this process, None for here.
        replicator: Copies committed steps to a second place, None for none.
    """

    store: Store
    ranks: Ranks
    retention: Retention
    layout: Layout = "packed"
    compression: int | None = None
    process: WriterProcess | None = None
    replicator: Replicator | None = None
    _claim: Claim | None = field(default=None, init=False)
    _recipe: Recipe | None = field(default=None, init=False)

    def run(self, job: Job) -> Future[bool] | None:
        """Save *job* together with the other ranks; a collective call.

        Returns:
            The copying to the second place, None if there is none.

        Raises:
            CheckpointError: On every rank if any of them failed; then nothing is left of the step.
        """
        try:
            return self._run(job)
        except CheckpointError as e:
            self.report(job.step, e)
            raise
        finally:
            job.let_go()

    def report(self, step: int, error: CheckpointError) -> None:
        """Log that *step* failed: every rank raises it, one says it, without a traceback."""
        if self.ranks.rank == 0:
            _LOG.error("checkpoint of step %d failed: %s", step, error)

    def prune_now(self, newest: int) -> list[int]:
        """Delete what need not be kept beside *newest*; return the steps deleted.

        Raises:
            CheckpointError: If somebody else is saving there, or the storage refuses.
        """
        try:
            if self._claim is None:
                self._claim = self.store.claim()
            self._claim.check()
            return prune(self.store, self.retention, newest)
        except (OSError, ValueError) as e:
            raise storage_error(f"deleting old steps in {self.store.url}", e) from e

    def release(self) -> None:
        """Let other writers in until the next save."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def close(self) -> None:
        """Let other writers in, and end the writer process."""
        self.release()
        if self.process is not None:
            self.process.close()

    def _run(self, job: Job) -> Future[bool] | None:
        share = job.agree()
        error, snapshot = "", None
        try:
            snapshot = job.stage(share)
        except Exception as e:  # noqa: BLE001  # the other ranks are waiting to hear of it
            error = f"copying to host memory failed: {e}"
        job.let_go()
        recipe = self._recipe_of(share)
        data = self.ranks.from_first(lambda: self._begin(job.step))
        report = RankReport(error=error)
        if snapshot is not None:
            report = self._write(job.step, data, recipe, snapshot)
        reports = self.ranks.gather(report)
        self.ranks.from_first(lambda: self._finish(job, data, recipe, reports))
        copying = None
        if self.replicator is not None:
            copying = self.replicator.start(job.step)
        if self.ranks.rank == 0:
            self._prune(job.step)
        return copying

    def _recipe_of(self, share: Share) -> Recipe:
        if self._recipe is None or self._recipe.plan is not share.plan:
            with paused():
                plan = share.plan
                self._recipe = make_recipe(plan, share.rank, self.layout, self.compression)
        return self._recipe

    def _begin(self, step: int) -> str:
        try:
            if self._claim is None:
                self._claim = self.store.claim()
            self._claim.check()
            return prepare(self.store)
        except (OSError, ValueError) as e:
            raise storage_error(f"preparing step {step} in {self.store.url}", e) from e

    def _write(self, step: int, data: str, recipe: Recipe, snapshot: Snapshot) -> RankReport:
        """Write this rank's bytes; what goes wrong is in the report, for all to hear."""
        path = f"{step_name(step)}/{data}"
        nbytes, rank = len(snapshot.data), self.ranks.rank
        copied = self.replicator is not None
        task = packed_task(path, rank, nbytes, self.compression, read_soon=copied)
        if recipe.arrays is not None:
            task |= {"path": path, "arrays": recipe.arrays, "group": rank == 0}
        report = self._try(snapshot, task)
        if recipe.any_turns:
            for turn in range(self.ranks.size):
                if turn == rank and recipe.turns and not report.error:
                    task |= {"arrays": recipe.turns, "group": False}
                    report = self._try(snapshot, task)
                self.ranks.any(False)  # the next one begins when this one is done
        return report

    def _try(self, snapshot: Snapshot, task: Task) -> RankReport:
        try:
            snapshot.wait()
            if self.process is not None:
                return RankReport(file=self.process.perform(task))
            return RankReport(file=writing.perform(self.store, task, snapshot.data))
        except Exception as e:  # noqa: BLE001  # the other ranks are waiting to hear of it
            place = f"{self.store.url}/{task['path']}"
            return RankReport(error=str(storage_error(f"writing {place}", e)))

    def _finish(self, job: Job, data: str, recipe: Recipe, reports: Sequence[RankReport]) -> None:
        assert recipe.table is not None
        manifest = Manifest(
            step=job.step,
            layout=self.layout,
            compression=self.compression,
            data=data,
            files=tuple(_data_file(r.file, self.compression) for r in reports if r.file),
            tensors=recipe.table,
            tree=job.tree,
            metrics=job.metrics,
            world_size=len(reports),
            created=now(),
            versions=versions(),
        )
        try:
            if self._claim is not None:
                self._claim.check()
            commit(self.store, manifest, recipe.text, reports)
        except (OSError, ValueError) as e:
            discard(self.store, job.step, data)
            raise storage_error(f"committing step {job.step} in {self.store.url}", e) from e
        except BaseException:
            discard(self.store, job.step, data)
            raise

    def _prune(self, step: int) -> None:
        needed = () if self.replicator is None else self.replicator.pending()
        try:
            prune(self.store, self.retention, step, needed=needed)
        except (OSError, ValueError, CheckpointError) as e:
            _LOG.warning("could not delete old steps in %s, will try again: %s", self.store.url, e)


def _data_file(file: dict[str, Any], compression: int | None) -> DataFile:
    grid = Grid(file["nbytes"], file["inner"], file["shard"], compression)
    return DataFile(path=file["path"], grid=grid, sha256=file["sha256"])
