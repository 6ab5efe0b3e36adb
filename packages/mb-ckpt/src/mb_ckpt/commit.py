# SPDX-License-Identifier: Apache-2.0
"""From "every rank has written" to "the step exists", or back to as if nothing had been begun."""

from __future__ import annotations

import hashlib
import logging
import platform
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from attrs import frozen

from mb_ckpt import manifest as format_
from mb_ckpt.boxes import Box, cover_fault
from mb_ckpt.catalogue import directories, read, step_name
from mb_ckpt.errors import CheckpointError
from mb_ckpt.manifest import MANIFEST, Chunk, DataFile, Manifest, TensorEntry
from mb_ckpt.tensorstore_io import get

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_ckpt.interfaces import Store

_LOG = logging.getLogger("mb_ckpt")

Row = tuple[str, str, tuple[int, ...], list[tuple[int, tuple[int, ...], tuple[int, ...]]]]
"""One stored piece: key, dtype, global shape, and first byte, offset and shape of each box."""


@frozen(kw_only=True)
class RankReport:
    """What one rank tells rank 0 when it has written.

    Attributes:
        step: The step it saved.
        file: Its array, None if it had nothing to store.
        rows: What is in the array.
        plain_keys: Keys of its plain tensors, which rank 0 must have too.
        error: What went wrong, or empty.
    """

    step: int
    file: DataFile | None = None
    rows: tuple[Row, ...] = ()
    plain_keys: tuple[str, ...] = ()
    error: str = ""


def prepare(store: Store) -> str:
    """Remove what crashed saves left behind; return a fresh name for data."""
    for other, names in directories(store).items():
        leftovers = [name for name in names if name.endswith(".tmp")]
        data = [name for name in names if name.startswith("data-")]
        if MANIFEST not in names:
            store.remove(step_name(other))
            continue
        if len(data) > 1:
            try:
                current = read(store, other).data
            except CheckpointError as e:
                _LOG.warning("%s", e)
                continue
            leftovers += [name for name in data if name != current]
        for name in leftovers:
            store.remove(f"{step_name(other)}/{name}")
    return f"data-{uuid.uuid4().hex[:8]}"


def commit(store: Store, step: int, data: str, tree: Any, reports: Sequence[RankReport]) -> None:
    """Make *step* exist, from what all ranks report in the order of their ranks.

    Raises:
        CheckpointError: If a rank failed, or the pieces do not make up whole tensors.
    """
    failed = [f"rank {rank}: {r.error}" for rank, r in enumerate(reports) if r.error]
    if failed:
        raise CheckpointError(f"step {step} was not saved: {'; '.join(failed)}")
    if len({report.step for report in reports}) > 1:
        steps = [report.step for report in reports]
        raise CheckpointError(f"ranks saved different steps at once, {steps}: save on all together")
    _check_visible(store, f"{step_name(step)}/{data}", reports)
    written = Manifest(
        step=step,
        data=data,
        files=tuple(r.file for r in reports if r.file is not None),
        tensors=_merge(reports),
        tree=tree,
        world_size=len(reports),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
    )
    store.publish(f"{step_name(step)}/{MANIFEST}", format_.encode(written))
    for name in store.names(step_name(step)):
        if name.startswith("data-") and name != data:  # of the step this one replaces
            store.remove(f"{step_name(step)}/{name}")


def discard(store: Store, step: int, data: str) -> None:
    """Remove what was written for a save that failed; an older commit of *step* stays.

    If the failure came after the manifest was in place (its directory could not be synced, say),
    the step is there as a whole, and is left there.
    """
    try:
        exists = MANIFEST in store.names(step_name(step))
        if not exists:
            store.remove(step_name(step))
        elif read(store, step).data != data:
            store.remove(f"{step_name(step)}/{data}")
    except (CheckpointError, OSError, ValueError) as e:
        _LOG.warning("could not remove the unfinished step %d, the next save will: %s", step, e)


def _check_visible(store: Store, path: str, reports: Sequence[RankReport]) -> None:
    """Refuse to commit files that only the machine of another rank can see."""
    for rank, report in enumerate(reports):
        if report.file is None:
            continue
        found = get(store.kvstore, f"{path}/{report.file.path}/zarr.json")
        if found is None or hashlib.sha256(found).hexdigest() != report.file.sha256:
            raise CheckpointError(
                f"rank 0 does not see what rank {rank} wrote below {store.url}/{path}: all ranks "
                "need the same shared directory"
            )


def _merge(reports: Sequence[RankReport]) -> dict[str, TensorEntry]:
    """Return all tensors, or raise if the pieces of one do not tile it."""
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    chunks: dict[str, list[Chunk]] = {}
    index = -1
    for rank, report in enumerate(reports):
        index += report.file is not None
        for key, dtype, shape, boxes in report.rows:
            known = kinds.setdefault(key, (dtype, shape))
            if known != (dtype, shape):
                raise CheckpointError(
                    f"tensor {key!r} is {dtype}{list(shape)} on rank {rank} but "
                    f"{known[0]}{list(known[1])} elsewhere: give it one key on all ranks"
                )
            held = chunks.setdefault(key, [])
            held.extend((index, start, offset, extent) for start, offset, extent in boxes)
    for key, (_, shape) in kinds.items():
        fault = cover_fault(shape, [Box(offset, extent) for _, _, offset, extent in chunks[key]])
        if fault:
            raise CheckpointError(f"tensor {key!r}{list(shape)} cannot be saved: {fault}")
    _check_plain(reports)
    return {
        key: TensorEntry(dtype=dtype, shape=shape, chunks=tuple(chunks[key]))
        for key, (dtype, shape) in kinds.items()
    }


def _check_plain(reports: Sequence[RankReport]) -> None:
    """Refuse plain tensors that only a later rank has: they would not be stored."""
    first = set(reports[0].plain_keys)
    for rank, report in enumerate(reports):
        alone = [key for key in report.plain_keys if key not in first]
        if alone:
            raise CheckpointError(
                f"plain tensor {alone[0]!r} is on rank {rank} but not on rank 0, which stores plain "
                "tensors: make it a TensorShard with a key of its own"
            )


def _versions() -> dict[str, str]:
    names = ("mb-ckpt", "tensorstore", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
