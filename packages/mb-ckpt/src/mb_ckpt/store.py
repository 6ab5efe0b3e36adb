# SPDX-License-Identifier: Apache-2.0
"""The object a training loop holds: save, load and look at the steps of one directory."""

from __future__ import annotations

import operator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, Self

from mb_ckpt import catalogue, loading, saver
from mb_ckpt.errors import CheckpointBusyError, CheckpointError
from mb_ckpt.inspection import StepInfo, Verified, describe, verify
from mb_ckpt.ranks import Ranks
from mb_ckpt.retention import Retention
from mb_ckpt.saver import Job, SaveHandle
from mb_ckpt.staging import HostBuffer, pack
from mb_ckpt.state import flatten
from mb_ckpt.stores import open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from types import TracebackType

    from mb_ckpt.manifest import Manifest


class CheckpointStore:
    """Checkpoints of one run below one directory.

    A step is either there as a whole or not there at all, and any parallel layout can load what any
    other has saved. With several ranks, every rank makes its own store with the same arguments (a
    collective call) and takes part in every `save`.

    Args:
        url_or_path: A directory that all ranks share, as a path or ``file:///path``, or
            ``memory://name`` within one process.
        keep_last: How many of the newest steps to keep; None for all.
        keep_every: Steps that are multiples of this stay whatever ``keep_last`` says. Alone it
            means ``keep_last=1``.
        process_group: The ranks that save together; None for all of them. The store makes gloo
            groups of its own beside it, so its background thread never meets other traffic.
        async_save: Whether `save` returns once the state is staged, or only when it is durable.
        on_busy: What `save` does while an earlier one is being written: ``"wait"`` for it, or
            ``"refuse"`` with `CheckpointBusyError`.
        timeout_s: Seconds that a rank waits for the others in the background.

    Raises:
        CheckpointError: If the location is not supported.
        ValueError: If ``keep_last``, ``keep_every`` or ``on_busy`` is out of range.
    """

    def __init__(
        self,
        url_or_path: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        process_group: Any = None,
        async_save: bool = True,
        on_busy: Literal["wait", "refuse"] = "wait",
        timeout_s: float = 1800.0,
    ) -> None:
        if on_busy not in ("wait", "refuse"):
            raise ValueError(f"on_busy={on_busy!r}: expected 'wait' or 'refuse'")
        self._store = open_store(url_or_path)
        self._retention = Retention(keep_last=keep_last, keep_every=keep_every)
        self._async = async_save
        self._refuses = on_busy == "refuse"
        self._front = Ranks.beside(process_group, timeout_s=timeout_s)
        self._back = Ranks.beside(process_group, timeout_s=timeout_s)
        if self._back.size > 1 and self._store.kvstore["driver"] == "memory":
            raise CheckpointError(
                f"{self._store.url} is the memory of one process, there are {self._back.size} ranks: "
                "give a directory they share"
            )
        self._buffer = HostBuffer()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mb-ckpt")
        self._last: SaveHandle | None = None

    @property
    def url(self) -> str:
        """Where the steps are."""
        return self._store.url

    def save(self, step: int, state: Mapping[str, Any]) -> SaveHandle:
        """Stage *state* and write it as *step*, replacing what was there under that number.

        Args:
            step: Optimizer steps done, not negative; the same on every rank.
            state: Nested mappings and sequences. Leaves are `TensorShard` (stored under their own
                keys; only those with ``replica_id=0``), tensors (stored under their dotted path
                from rank 0, on which all must be), plain Python data (from rank 0), and
                objects with ``state_dict`` and ``load_state_dict``, such as modules and optimizers.

        Returns:
            The handle of the save. ``result()`` raises if it fails, on all ranks alike; an earlier
            checkpoint is untouched by that and the next save starts afresh.

        Raises:
            CheckpointError: If the state cannot be stored, or with ``async_save=False`` if the save
                fails.
            CheckpointBusyError: If an earlier save is going on and ``on_busy="refuse"``.
        """
        step = _whole_number(step)
        self._wait_or_refuse(step)
        refusal: Exception | None = None
        try:
            job = self._stage(step, state)
        except Exception as e:
            refusal, job = e, Job(step=step, error=str(e))
            if self._back.size == 1:
                raise
        future = self._thread.submit(saver.run, self._store, self._back, job, self._retention)
        path = f"{self._store.url}/{catalogue.step_name(step)}"
        self._last = SaveHandle(step, path, job.snapshot, future)
        if refusal is not None:  # after the others have been given word, or they would wait
            raise refusal
        if not self._async:
            self._last.result()
        return self._last

    def load(self, state: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
        """Fill the tensors, shards and objects of *state* in place from a stored step.

        Args:
            state: As for `save`, in this rank's layout. It may be part of what is stored, and its
                keys may differ between ranks. Plain data in it is not looked at. A module must have
                the very keys that were stored for it.
            step: Which one, or None for the newest that is committed (then a collective call).

        Returns:
            The plain data as it was stored, without the tensors.

        Raises:
            CheckpointError: If there is no such step, keys are missing, or shapes or dtypes differ;
                then nothing has been changed.
            CorruptCheckpointError: If stored bytes are damaged; names tensor and file. Tensors
                may then have been filled in part.
        """
        self.wait()
        if step is None:
            manifest = self._front.from_first(lambda: catalogue.read_newest(self._store))
        else:
            manifest = catalogue.read(self._store, step)
        return loading.load(self._store, manifest, state)

    def steps(self) -> list[int]:
        """Return the committed steps with a readable manifest, ascending."""
        return catalogue.committed(self._store)

    def verify(self, step: int | None = None) -> Verified:
        """Read every byte of *step* (None: the newest) against its checksum.

        Raises:
            CorruptCheckpointError: If something is damaged or missing; names tensors and files.
        """
        return verify(self._store, self._manifest(step))

    def inspect(self, step: int | None = None) -> StepInfo:
        """Return what *step* (None: the newest) holds, from its manifest alone."""
        return describe(self._store, self._manifest(step))

    def wait(self) -> None:
        """Return when no save of this store is going on; say nothing of how it went."""
        if self._last is not None:
            self._last.wait()

    def close(self) -> None:
        """Wait for the last save and give up the thread, the groups and the buffer.

        Raises:
            CheckpointError: If the last save failed and nobody has asked its handle.
        """
        self._thread.shutdown(wait=True)
        self._front.close()
        self._back.close()
        self._buffer = HostBuffer()
        last, self._last = self._last, None
        if last is not None and not last.asked:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _manifest(self, step: int | None) -> Manifest:
        if step is None:
            return catalogue.read_newest(self._store)
        return catalogue.read(self._store, step)

    def _wait_or_refuse(self, step: int) -> None:
        last = self._last
        if last is None:
            return
        if self._refuses:
            # All ranks refuse or none: one that went on alone would wait for the others for ever.
            busy = self._front.any(not last.done())
            if busy:
                raise CheckpointBusyError(
                    f"step {step} was not saved: step {last.step} is still being written; save less "
                    "often or use on_busy='wait'"
                )
        self.wait()

    def _stage(self, step: int, state: Mapping[str, Any]) -> Job:
        flat = flatten(state)
        first = self._back.rank == 0
        own = [p for p in flat.pieces if (first if p.plain else p.replica_id == 0)]
        starts, total = pack(own)
        return Job(
            step=step,
            tree=flat.tree if first else None,
            snapshot=self._buffer.stage(own, starts, total),
            rows=saver.table_rows(own, starts),
            plain_keys=tuple(p.key for p in flat.pieces if p.plain),
        )


def _whole_number(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0 or isinstance(step, bool):
        raise CheckpointError(f"step={step!r}: expected a whole number from 0 on")
    return number
