# SPDX-License-Identifier: Apache-2.0
"""Looking for steps in several places, the fast one first."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mb_ckpt.errors import CheckpointError, CorruptCheckpointError
from mb_ckpt.format.manifest import NewerFormatError
from mb_ckpt.loading import matching as loading
from mb_ckpt.places import catalogue

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mb_ckpt.format.manifest import Manifest
    from mb_ckpt.interfaces import Store
    from mb_ckpt.loading.matching import Loaded, LoadOptions

_LOG = logging.getLogger("mb_ckpt")

Found = list[tuple[int, "Manifest"]]
"""One step: the places that have it, by index, and its manifest there; never empty."""


def steps(places: Sequence[Store]) -> list[int]:
    """Return the steps with a readable manifest in any of *places*, ascending."""
    if len(places) == 1:
        return catalogue.committed(places[0])
    found: set[int] = set()
    for place in _reachable(places):
        found |= set(catalogue.committed(places[place]))
    return sorted(found)


def newest(places: Sequence[Store]) -> Found:
    """Return the newest step that is valid in any of *places*.

    A corrupt manifest is logged as a warning and passed over. One of a newer format is an error:
    going back in silence would lose steps.

    Raises:
        CheckpointError: If there is none.
    """
    found: Found = []
    errors: list[CheckpointError] = []
    for index in _reachable(places):
        try:
            manifest = catalogue.read_newest(places[index])
        except NewerFormatError:
            raise
        except CheckpointError as e:
            errors.append(e)
            continue
        if not found or manifest.step >= found[0][1].step:
            found = [*(f for f in found if f[1].step == manifest.step), (index, manifest)]
    if not found:
        raise errors[0]
    return found


def of_step(places: Sequence[Store], step: int) -> Found:
    """Return *step* in those of *places* that have a valid manifest of it.

    Raises:
        CheckpointError: If there is no such step, or its manifest cannot be used.
    """
    found: Found = []
    errors: list[CheckpointError] = []
    for index in _reachable(places):
        try:
            found.append((index, catalogue.read(places[index], step)))
        except CheckpointError as e:
            errors.append(e)
    if not found:
        raise errors[0]
    return found


def load(
    places: Sequence[Store], found: Found, state: Mapping[str, Any], options: LoadOptions
) -> Loaded:
    """Fill *state* from the first of *found* whose bytes are as they were written.

    Raises:
        CheckpointError: See `CheckpointStore.load`.
    """
    for index, manifest in found[:-1]:
        try:
            return loading.load(places[index], manifest, state, options)
        except CorruptCheckpointError as e:
            _LOG.warning("%s; trying the other place", e)
    index, manifest = found[-1]
    return loading.load(places[index], manifest, state, options)


def _reachable(places: Sequence[Store]) -> list[int]:
    """Return the indices of places that answer; all of them if only one is given."""
    if len(places) == 1:
        return [0]
    answering = []
    for index, place in enumerate(places):
        try:
            catalogue.directories(place)
        except CheckpointError as e:
            _LOG.warning("%s; going on without it", e)
        else:
            answering.append(index)
    if not answering:
        raise CheckpointError(
            f"none of {', '.join(place.url for place in places)} can be reached: check the network "
            "and the credentials"
        )
    return answering
