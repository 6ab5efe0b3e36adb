# SPDX-License-Identifier: Apache-2.0
"""The object a training loop holds: save, load and look at the steps of one directory."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Literal, Self

from mb_ckpt.collector import paused
from mb_ckpt.comparison import Comparison, compare
from mb_ckpt.errors import CheckpointBusyError, CheckpointError
from mb_ckpt.inspection import StepInfo, Verified, describe, verify
from mb_ckpt.loading import tiers
from mb_ckpt.loading.matching import Loaded, LoadOptions
from mb_ckpt.places import catalogue, retention
from mb_ckpt.places.replication import Replicator
from mb_ckpt.places.retention import Best, Retention
from mb_ckpt.places.stores import open_store
from mb_ckpt.ranks import Ranks
from mb_ckpt.saving.saver import SaveHandle, Saver
from mb_ckpt.saving.stager import Stager
from mb_ckpt.saving.writer_process import WriterProcess

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from mb_ckpt.format.manifest import Manifest
    from mb_ckpt.interfaces import Store
    from mb_ckpt.saving.recipes import Layout


class CheckpointStore:
    """Checkpoints of one run below one directory.

    A step is either there as a whole or not there at all, and any parallel layout can load what any
    other has saved. With several ranks, every rank makes its own store with the same arguments (a
    collective call) and takes part in every `save`.

    Args:
        url_or_path: A place that all ranks share: a path, ``file:///path``, ``s3://bucket/prefix``
            or ``gs://bucket/prefix``, or ``memory://name`` within one process.
        keep_last: How many of the newest steps to keep; None for all.
        keep_every: Steps that are multiples of this stay whatever else is said. Alone it means
            ``keep_last=1``.
        keep_best: Steps with the best metrics stay, too. Alone it means ``keep_last=1``.
        process_group: The ranks that save together; None for all of them. The store makes gloo
            groups of its own beside it, so its background thread never meets other traffic.
        async_save: Whether `save` returns once the state is staged, or only when it is durable.
        staging: ``"eager"`` copies the state before `save` returns. ``"lazy"`` copies it behind what
            comes next, on a thread or, from CUDA, on a stream of its own: then nothing of the state
            may change before ``wait_staged()`` of the handle has returned. Plain data, and buffers
            of modules in the state, which a forward pass may change, are copied at once either way.
        writer: ``"thread"`` writes on a thread of this process, ``"process"`` in a process of its
            own out of shared memory (Linux).
        on_busy: What `save` does while an earlier one is being written: ``"wait"`` for it, or
            ``"refuse"`` with `CheckpointBusyError`.
        layout: ``"packed"`` puts all values of a rank into one array; ``"zarr"`` makes every tensor a
            zarr array that other tools can read, and is slower with many tensors.
        compression: ``"zstd"``, or None for none.
        compression_level: Of zstd, 1 (fast) to 22 (small).
        allow_pickle: Whether `save` may pickle objects of the state that are nothing plain, and `load`
            may run pickles. Only where you trust whoever can write to the place: a pickle can run
            anything.
        replicate_to: A second place, to which every committed step is copied in the background.
            `load` takes the newest step of both.
        replica_keep_last: How many of the newest steps to keep there; None for all.
        timeout_s: Seconds that a rank waits for the others in the background.

    Raises:
        CheckpointError: If the location is not supported.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        url_or_path: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: Best | None = None,
        process_group: Any = None,
        async_save: bool = True,
        staging: Literal["eager", "lazy"] = "eager",
        writer: Literal["thread", "process"] = "thread",
        on_busy: Literal["wait", "refuse"] = "wait",
        layout: Layout = "packed",
        compression: Literal["zstd"] | None = None,
        compression_level: int = 3,
        allow_pickle: bool = False,
        replicate_to: str | os.PathLike[str] | None = None,
        replica_keep_last: int | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        _one_of("staging", staging, ("eager", "lazy"))
        _one_of("writer", writer, ("thread", "process"))
        _one_of("on_busy", on_busy, ("wait", "refuse"))
        _one_of("layout", layout, ("packed", "zarr"))
        _one_of("compression", compression, (None, "zstd"))
        if not 1 <= compression_level <= 22:
            raise ValueError(f"compression_level={compression_level}: expected 1 to 22")
        rules = Retention(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        there = Retention(keep_last=replica_keep_last)
        self._store = open_store(url_or_path)
        self._async = async_save
        self._refuses = on_busy == "refuse"
        self._front = Ranks.beside(process_group, timeout_s=timeout_s)
        back = Ranks.beside(process_group, timeout_s=timeout_s)
        self._places = [self._checked(self._store, back.size)]
        self._replicator: Replicator | None = None
        if replicate_to is not None:
            second = self._checked(open_store(replicate_to), back.size)
            self._places.append(second)
            copying = Ranks.beside(process_group, timeout_s=timeout_s)
            self._replicator = Replicator(self._store, second, copying, there)
        shared = writer == "process"
        if shared and self._store.kvstore["driver"] == "memory":
            raise ValueError("writer='process' cannot write to memory:// of this process")
        self._pickles = allow_pickle
        self._stager = Stager(
            self._front, back, lazy=staging == "lazy", shared=shared, pickles=allow_pickle
        )
        self._saver = Saver(
            store=self._store,
            ranks=back,
            retention=rules,
            layout=layout,
            compression=compression_level if compression else None,
            process=WriterProcess(self._store.url, self._stager.descriptor) if shared else None,
            replicator=self._replicator,
        )
        self._last: SaveHandle | None = None

    @property
    def url(self) -> str:
        """Where the steps are."""
        return self._store.url

    def save(
        self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Stage *state* and write it as *step*, replacing what was there under that number.

        Args:
            step: Optimizer steps done, not negative; the same on every rank.
            state: Nested mappings and sequences. Leaves are `TensorShard` (stored under their own
                keys, once for each ``replica_id=0``), tensors and numpy arrays (stored under their
                dotted path; the same on every rank), plain Python data (from rank 0), and
                objects with ``state_dict`` and ``load_state_dict``, such as modules and optimizers.
                DTensors are stored as the pieces they are.
            metrics: Numbers that ``keep_best`` goes by, such as ``{"loss": 2.5}``; rank 0's count.

        Returns:
            The handle of the save. ``result()`` raises if it fails, on all ranks alike; an earlier
            checkpoint is untouched by that and the next save starts afresh.

        Raises:
            CheckpointError: If the state cannot be stored, or with ``async_save=False`` if the save
                fails.
            CheckpointBusyError: If an earlier save is going on and ``on_busy="refuse"``.
        """
        step = _whole_number(step)
        values = {str(name): float(value) for name, value in (metrics or {}).items()}
        self._wait_or_refuse(step)
        path = f"{self._store.url}/{catalogue.step_name(step)}"
        self._last, refusal = self._stager.begin(self._saver, step, path, state, values)
        if refusal is not None:  # after the others have been given word, or they would wait
            self._last.asked = True
            raise refusal
        if not self._async:
            self._last.result()
        return self._last

    def load(
        self,
        state: Mapping[str, Any],
        step: int | None = None,
        *,
        only: str | Iterable[str] | None = None,
        rename: Mapping[str, str] | None = None,
        missing: Literal["error", "ignore"] = "error",
        unexpected: Literal["modules", "error", "ignore"] = "modules",
        cast: bool = False,
        device: Any = None,
    ) -> Loaded:
        """Fill the tensors, shards and objects of *state* in place from a stored step.

        Args:
            state: As for `save`, in this rank's layout. It may be part of what is stored, and its
                keys may differ between ranks. Plain data in it is not looked at.
            step: Which one, or None for the newest that is committed (then a collective call).
            only: Beginnings of keys of the state: nothing else is filled.
            rename: Beginnings of keys of the state, and what they are called in the step.
            missing: What to do about keys of the state that the step lacks: refuse, or leave them.
            unexpected: Which keys of the step that nothing asks for to refuse: those of modules in
                the state, all (below ``only`` if given), or none.
            cast: Whether to convert values to the dtypes of the state, instead of refusing others.
            device: Where modules of the state that were built on ``meta`` get memory; None for the
                CPU.

        Returns:
            The plain data as it was stored, without the tensors; and the lists of what was filled,
            missing and unexpected.

        Raises:
            CheckpointError: If there is no such step, keys are missing, or shapes or dtypes differ;
                then nothing has been changed.
            CorruptCheckpointError: If stored bytes are damaged; names tensor and file. Tensors
                may then have been filled in part.
        """
        self.wait()
        options = LoadOptions(
            only=(only,) if isinstance(only, str) else None if only is None else tuple(only),
            rename=dict(rename or {}),
            missing=_one_of("missing", missing, ("error", "ignore")),
            unexpected=_one_of("unexpected", unexpected, ("modules", "error", "ignore")),
            cast=cast,
            device=device,
            pickles="run" if self._pickles else "refuse",
            alone=self._front.size == 1,
        )
        with paused():
            if step is None:
                found = self._front.from_first(lambda: tiers.newest(self._places))
            else:
                found = tiers.of_step(self._places, step)
            return tiers.load(self._places, found, state, options)

    def steps(self) -> list[int]:
        """Return the committed steps with a readable manifest, in any of the places, ascending."""
        return tiers.steps(self._places)

    def verify(
        self, step: int | None = None, *, progress: Callable[[int, int], None] = lambda *_: None
    ) -> Verified:
        """Read every byte of *step* (None: the newest) against its checksum.

        Args:
            step: Which one.
            progress: Called with the bytes read so far, and all that will be.

        Raises:
            CorruptCheckpointError: If something is damaged or missing; names tensors and files.
        """
        return verify(*self.find(step), progress)

    def inspect(self, step: int | None = None) -> StepInfo:
        """Return what *step* (None: the newest) holds, from its manifest alone."""
        return describe(*self.find(step))

    def compare(
        self,
        other: CheckpointStore,
        *,
        step: int | None = None,
        other_step: int | None = None,
        prefix: str = "",
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> Comparison:
        """Return how *step* differs from *other_step* of *other*; None stands for the newest.

        Args:
            other: Another store, or this one.
            step: Of this store.
            other_step: Of *other*.
            prefix: Only tensors whose keys begin with this.
            progress: Called with the bytes read so far, and all that will be.

        Raises:
            CheckpointError: If there is no such step.
            CorruptCheckpointError: If stored bytes are damaged.
        """
        first, second = self.find(step), other.find(other_step)
        return compare(first, second, prefix=prefix, progress=progress)

    def prune(self, *, dry_run: bool = False) -> list[int]:
        """Delete what the ``keep_...`` settings do not keep; on one rank, while nothing is saved.

        Args:
            dry_run: Delete nothing.

        Returns:
            The steps deleted, or that would be.
        """
        steps = catalogue.committed(self._store)
        if not steps:
            return []
        if dry_run:
            return retention.plan(self._store, self._saver.retention, steps[-1])
        return self._saver.prune_now(steps[-1])

    def wait(self) -> None:
        """Return when no save of this store is going on; say nothing of how it went."""
        if self._last is not None:
            self._last.wait()

    def let_others_save(self) -> None:
        """Wait for the last save, and give up the hold on the place until the next one."""
        self.wait()
        self._saver.release()

    def close(self) -> None:
        """Wait for the last save and its copy, and give up threads, groups, lock and memory.

        Raises:
            CheckpointError: If the last save failed and nobody has asked its handle.
        """
        self._stager.finish()
        if self._replicator is not None:
            self._replicator.close()
        self._saver.close()
        self._stager.close()
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

    def find(self, step: int | None = None) -> tuple[Store, Manifest]:
        """Return the first place that has *step* (None: the newest), and its manifest there.

        Raises:
            CheckpointError: If there is no such step.
        """
        found = tiers.newest(self._places) if step is None else tiers.of_step(self._places, step)
        index, manifest = found[0]
        return self._places[index], manifest

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

    @staticmethod
    def _checked(store: Store, size: int) -> Store:
        if size > 1 and store.kvstore["driver"] == "memory":
            raise CheckpointError(
                f"{store.url} is the memory of one process, there are {size} ranks: give a "
                "directory they share"
            )
        return store


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        expected = " or ".join(repr(one) for one in allowed)
        raise ValueError(f"{name}={value!r}: expected {expected}")
    return value


def _whole_number(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0 or isinstance(step, bool):
        raise CheckpointError(f"step={step!r}: expected a whole number from 0 on")
    return number
