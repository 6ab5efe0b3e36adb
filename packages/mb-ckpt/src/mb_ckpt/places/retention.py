# SPDX-License-Identifier: Apache-2.0
"""Which old steps to delete, and how."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge, in_, optional

from mb_ckpt.errors import CheckpointError
from mb_ckpt.format.manifest import MANIFEST
from mb_ckpt.places.catalogue import committed, read, step_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from mb_ckpt.interfaces import Store

_LOG = logging.getLogger("mb_ckpt")


@frozen(kw_only=True)
class Best:
    """The steps with the best value of a metric given to ``save``.

    Attributes:
        metric: Its name.
        count: How many steps to keep.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
    """

    metric: str
    count: int = field(default=1, validator=ge(1))
    mode: str = field(default="min", validator=in_(("min", "max")))

    def among(self, values: Mapping[int, float]) -> set[int]:
        """Return the best of *values* by step; of equal ones the later, and never nan."""
        sign = 1 if self.mode == "min" else -1
        ranked = sorted((sign * v, -step) for step, v in values.items() if not math.isnan(v))
        return {-negative for _, negative in ranked[: self.count]}


@frozen(kw_only=True)
class Retention:
    """What stays when a newer step has been committed.

    Attributes:
        keep_last: How many of the newest steps; None keeps all, unless another rule is set, which
            makes it 1.
        keep_every: Steps that are multiples of this stay for good.
        keep_best: The best by a metric stay.
    """

    keep_last: int | None = field(default=None, validator=optional(ge(1)))
    keep_every: int | None = field(default=None, validator=optional(ge(1)))
    keep_best: Best | None = None

    def superseded(
        self, steps: Iterable[int], newest: int, best: Collection[int] = ()
    ) -> list[int]:
        """Return which *steps* may go now that *newest* is committed.

        Steps above *newest* belong to another run of the job and are never touched.

        Args:
            steps: Committed and readable.
            newest: Among them.
            best: Steps that ``keep_best`` keeps.
        """
        if self == Retention():
            return []
        older = sorted(step for step in steps if step < newest)
        kept = (self.keep_last or 1) - 1
        candidates = older[: max(0, len(older) - kept)]
        every = self.keep_every
        return [s for s in candidates if s not in best and not (every and s % every == 0)]


def prune(
    store: Store, retention: Retention, newest: int, *, needed: Collection[int] = ()
) -> list[int]:
    """Delete what *retention* no longer keeps; return the steps deleted.

    The manifest goes first: from then on the step does not exist, and a crash leaves only files
    that the next save removes. Nothing goes unless *newest* itself is there and readable.

    Args:
        store: Where.
        retention: What to keep.
        newest: The step just committed.
        needed: Steps to keep for now, whatever *retention* says.
    """
    gone = plan(store, retention, newest, needed=needed)
    for step in gone:
        store.remove(f"{step_name(step)}/{MANIFEST}")
        store.remove(step_name(step))
    return gone


def plan(
    store: Store, retention: Retention, newest: int, *, needed: Collection[int] = ()
) -> list[int]:
    """Return the steps that `prune` would delete."""
    if retention == Retention():
        return []
    steps = committed(store)
    if newest not in steps:
        _LOG.warning("step %d in %s is not readable: no older one is deleted", newest, store.url)
        return []
    best: set[int] = set()
    if retention.keep_best is not None:
        best = retention.keep_best.among(_values(store, steps, retention.keep_best.metric))
    return [s for s in retention.superseded(steps, newest, best) if s not in needed]


def _values(store: Store, steps: Iterable[int], metric: str) -> dict[int, float]:
    values = {}
    for step in steps:
        try:
            metrics = read(store, step).metrics
        except CheckpointError as e:
            _LOG.warning("%s", e)
            continue
        if metric in metrics:
            values[step] = metrics[metric]
    return values
