# SPDX-License-Identifier: Apache-2.0
"""From "every rank has written" to "the step exists", or back to as if nothing had been begun."""

from __future__ import annotations

import hashlib
import logging
import platform
import uuid
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from attrs import frozen

from mb_ckpt.errors import CheckpointError
from mb_ckpt.format import manifest as format_
from mb_ckpt.format.manifest import MANIFEST
from mb_ckpt.format.tensorstore_io import get
from mb_ckpt.places.catalogue import directories, read, step_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_ckpt.format.manifest import Manifest
    from mb_ckpt.interfaces import Store

_LOG = logging.getLogger("mb_ckpt")


@frozen(kw_only=True)
class RankReport:
    """What one rank tells rank 0 when it has written.

    Attributes:
        file: Its packed array as `mb_ckpt.saving.writing.perform` returns it, None if it has none.
        error: What went wrong, or empty.
    """

    file: dict[str, Any] | None = None
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


def commit(store: Store, written: Manifest, table: str, reports: Sequence[RankReport]) -> None:
    """Make a step exist, once all ranks have reported, in the order of their ranks.

    Args:
        store: Where.
        written: What was written.
        table: Its tensors, encoded.
        reports: Of all ranks.

    Raises:
        CheckpointError: If a rank failed, or wrote where rank 0 cannot see it.
    """
    step = written.step
    failed = [f"rank {rank}: {r.error}" for rank, r in enumerate(reports) if r.error]
    if failed:
        raise CheckpointError(f"step {step} was not saved: {'; '.join(failed)}")
    _check_visible(store, f"{step_name(step)}/{written.data}", reports)
    store.publish(f"{step_name(step)}/{MANIFEST}", format_.encode(written, table))
    for name in store.names(step_name(step)):
        if name.startswith("data-") and name != written.data:  # of the step this one replaces
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
        found = get(store.kvstore, f"{path}/{report.file['path']}/zarr.json")
        if found is None or hashlib.sha256(found).hexdigest() != report.file["sha256"]:
            raise CheckpointError(
                f"rank 0 does not see what rank {rank} wrote below {store.url}/{path}: all ranks "
                "need the same shared directory"
            )


def now() -> str:
    """Return the time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def versions() -> dict[str, str]:
    """Return the versions of the software that writes."""
    names = ("mb-ckpt", "tensorstore", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
