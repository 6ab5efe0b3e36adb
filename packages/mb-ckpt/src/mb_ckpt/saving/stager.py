# SPDX-License-Identifier: Apache-2.0
"""The foreground half of a save: look at the state, and copy it now or have it copied behind."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen

from mb_ckpt.collector import paused
from mb_ckpt.errors import CheckpointError
from mb_ckpt.saving.host_memory import HostMemory
from mb_ckpt.saving.planning import Share, agree
from mb_ckpt.saving.saver import Job, SaveHandle, Saver
from mb_ckpt.saving.staging import Fence, HostBuffer
from mb_ckpt.states.flattening import FlatState, flatten
from mb_ckpt.states.memo import Memo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_ckpt.ranks import Ranks
    from mb_ckpt.saving.staging import Snapshot


@frozen(kw_only=True, eq=False)
class _Wanted:
    """A save that was asked for, and why this rank cannot take part, or nothing."""

    step: int
    path: str
    flat: FlatState
    metrics: dict[str, float]
    error: str


@define(eq=False)
class _Behind:
    """What a lazy copy holds on to until it is done."""

    tensors: list[torch.Tensor]
    fence: Fence = field(factory=Fence)

    def let_go(self) -> None:
        self.tensors = []
        self.fence.open()


class Stager:
    """Makes jobs of states, one at a time.

    Args:
        front: The ranks, for calls from `CheckpointStore.save` itself.
        back: The ranks, for calls from the background thread.
        lazy: Whether tensors are copied by the background thread.
        shared: Whether to copy into memory that another process can map.
        pickles: Whether to pickle objects that are nothing plain.
    """

    def __init__(
        self, front: Ranks, back: Ranks, *, lazy: bool, shared: bool, pickles: bool
    ) -> None:
        self._front = front
        self._back = back
        self._lazy = lazy
        self._pickles = pickles
        self._memory = HostMemory(shared=shared)
        self._buffer = HostBuffer(self._memory)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mb-ckpt")
        self._share: Share | None = None
        self._memo = Memo()

    @property
    def descriptor(self) -> int:
        """Of the memory that is copied into; -1 if no other process can map it."""
        return self._memory.descriptor

    def begin(
        self,
        saver: Saver,
        step: int,
        path: str,
        state: Mapping[str, Any],
        metrics: dict[str, float],
    ) -> tuple[SaveHandle, Exception | None]:
        """Begin to save *state*; no other save may be going on.

        Returns:
            The handle, and why this rank cannot save, None if it can.

        Raises:
            Exception: Why this rank cannot save, if it is the only one.
        """
        refusal: Exception | None = None
        flat = FlatState()
        try:
            with paused():
                flat = flatten(state, memo=self._memo, pickles=self._pickles)
            self._check_readers(flat)
        except Exception as e:
            refusal = e
            if self._back.size == 1:
                raise
        start = self._begin_lazy if self._lazy else self._begin_eager
        error = "" if refusal is None else str(refusal)
        wanted = _Wanted(step=step, path=path, flat=flat, metrics=metrics, error=error)
        return start(saver, wanted), refusal

    def finish(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown(wait=True)

    def close(self) -> None:
        """Give up the groups and the memory."""
        self._front.close()
        self._back.close()
        self._buffer.close()

    def _begin_eager(self, saver: Saver, wanted: _Wanted) -> SaveHandle:
        try:
            share = self._agreed(self._front, wanted)
        except CheckpointError as e:
            failed: Future[Future[bool] | None] = Future()
            failed.set_exception(e)
            saver.report(wanted.step, e)
            return SaveHandle(wanted.step, wanted.path, failed)
        snapshot: Snapshot | None = None
        problem: Exception | None = None
        try:
            flat = wanted.flat
            snapshot, _ = self._buffer.stage(share, flat.tensors, readers=flat.readers)
        except Exception as e:  # noqa: BLE001  # the other ranks are told by the job
            problem = e

        def staged(_: Share) -> Snapshot:
            if snapshot is None:
                raise CheckpointError(str(problem))
            return snapshot

        job = _job(wanted, agree=lambda: share, stage=staged, let_go=_nothing)
        future = self._thread.submit(saver.run, job)
        fence = None if snapshot is None else snapshot.wait
        if wanted.flat.readers:  # nothing is copied before it is written
            fence = partial(_wait, future)
        return SaveHandle(wanted.step, wanted.path, future, fence)

    def _begin_lazy(self, saver: Saver, wanted: _Wanted) -> SaveHandle:
        behind = _Behind(wanted.flat.tensors)
        for i in wanted.flat.changing:
            behind.tensors[i] = behind.tensors[i].detach().clone()
        ready = _event_now(behind.tensors)

        def copied(share: Share) -> Snapshot:
            snapshot, event = self._buffer.stage(share, behind.tensors, ready=ready)
            behind.fence.open(event)
            snapshot.wait()  # tensors that only this save holds must outlive the copy
            return snapshot

        job = _job(
            wanted,
            agree=lambda: self._agreed(self._back, wanted),
            stage=copied,
            let_go=behind.let_go,
        )
        future = self._thread.submit(saver.run, job)
        return SaveHandle(wanted.step, wanted.path, future, behind.fence.wait)

    def _check_readers(self, flat: FlatState) -> None:
        if flat.readers and (self._lazy or self._memory.descriptor >= 0):
            key = flat.specs[next(iter(flat.readers))].key
            raise CheckpointError(
                f"shard {key!r} is read when it is written: that needs a store with "
                "staging='eager' and writer='thread'"
            )

    def _agreed(self, ranks: Ranks, wanted: _Wanted) -> Share:
        specs = wanted.flat.specs
        self._share = agree(ranks, wanted.step, specs, self._share, wanted.error)
        return self._share


def _job(wanted: _Wanted, **parts: Any) -> Job:
    return Job(step=wanted.step, tree=wanted.flat.tree, metrics=wanted.metrics, **parts)


def _event_now(tensors: list[torch.Tensor]) -> Any:
    """Return a CUDA event after all that is queued now; None without CUDA tensors."""
    device = next((t.device for t in tensors if t.is_cuda), None)
    if device is None:
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _wait(future: Future[Any]) -> None:
    wait([future])


def _nothing() -> None:
    """An eager copy holds on to no tensors."""
