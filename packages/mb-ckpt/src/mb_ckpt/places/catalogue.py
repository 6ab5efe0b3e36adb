# SPDX-License-Identifier: Apache-2.0
"""Which steps a store holds; always found by listing, never from a pointer to the newest."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from mb_ckpt.errors import CheckpointError, CorruptCheckpointError, storage_error
from mb_ckpt.format import manifest as format_
from mb_ckpt.format.manifest import MANIFEST, Manifest
from mb_ckpt.format.tensorstore_io import get

if TYPE_CHECKING:
    from mb_ckpt.interfaces import Store

_LOG = logging.getLogger("mb_ckpt")
_STEP = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """Return the directory of *step*."""
    return f"step_{step:08d}"


def directories(store: Store) -> dict[int, list[str]]:
    """Return the names in the directory of every step, committed or not, by step, ascending."""
    try:
        found = [(_STEP.fullmatch(name), names) for name, names in store.tree().items()]
        return dict(sorted((int(match[1]), names) for match, names in found if match))
    except (OSError, ValueError) as e:
        raise storage_error(f"listing {store.url}", e) from e


def committed(store: Store) -> list[int]:
    """Return the steps whose manifest is there and readable, ascending.

    A manifest that is corrupt or newer than this reader is logged as a warning, and left out.
    """
    steps = []
    for step, names in directories(store).items():
        if MANIFEST in names:
            try:
                format_.check(_raw(store, step), where(store, step))
            except CheckpointError as e:
                _LOG.warning("%s", e)
            else:
                steps.append(step)
    return steps


def read(store: Store, step: int) -> Manifest:
    """Return the manifest of *step*.

    Raises:
        CheckpointError: If there is no such step, or its manifest cannot be used.
    """
    present = [s for s, names in directories(store).items() if MANIFEST in names]
    if step not in present:
        raise CheckpointError(f"no step {step} in {store.url}: {_offer(present)}")
    return format_.decode(_raw(store, step), where(store, step))


def read_newest(store: Store) -> Manifest:
    """Return the manifest of the newest step that has a valid one.

    A corrupt manifest newer than that is logged as a warning and passed over. One of a newer format
    is an error: going back in silence would lose steps.

    Raises:
        CheckpointError: If there is none.
    """
    present = [s for s, names in directories(store).items() if MANIFEST in names]
    for step in reversed(present):
        try:
            return format_.decode(_raw(store, step), where(store, step))
        except CorruptCheckpointError as e:
            _LOG.warning("%s; looking for an older step", e)
    raise CheckpointError(
        f"no checkpoint in {store.url}: expected a step_XXXXXXXX directory with a valid "
        f"{MANIFEST}; check the path, or start without loading"
    )


def where(store: Store, step: int) -> str:
    """Return the manifest's place, for messages."""
    return f"{store.url}/{step_name(step)}/{MANIFEST}"


def _raw(store: Store, step: int) -> bytes:
    try:
        return get(store.kvstore, f"{step_name(step)}/{MANIFEST}") or b""
    except (OSError, ValueError) as e:
        raise storage_error(f"reading {where(store, step)}", e) from e


def _offer(present: list[int]) -> str:
    if not present:
        return "it holds no checkpoint at all"
    listed = ", ".join(map(str, present[-8:]))
    return f"it holds {'..., ' if len(present) > 8 else ''}{listed}"
