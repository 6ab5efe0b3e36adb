# SPDX-License-Identifier: Apache-2.0
"""Which old steps to delete, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge, optional

from mb_ckpt.catalogue import committed, step_name
from mb_ckpt.manifest import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mb_ckpt.interfaces import Store


@frozen(kw_only=True)
class Retention:
    """What stays when a newer step has been committed.

    Attributes:
        keep_last: How many of the newest steps; None keeps all, unless ``keep_every`` is set, which
            makes it 1.
        keep_every: Steps that are multiples of this stay for good.
    """

    keep_last: int | None = field(default=None, validator=optional(ge(1)))
    keep_every: int | None = field(default=None, validator=optional(ge(1)))

    def superseded(self, steps: Iterable[int], newest: int) -> list[int]:
        """Return which *steps* may go now that *newest* is committed.

        Steps above *newest* belong to another run of the job and are never touched.
        """
        if self.keep_last is None and self.keep_every is None:
            return []
        older = sorted(step for step in steps if step < newest)
        kept = (self.keep_last or 1) - 1
        candidates = older[: len(older) - kept] if kept else older
        return [s for s in candidates if not self.keep_every or s % self.keep_every]


def prune(store: Store, retention: Retention, newest: int) -> list[int]:
    """Delete what *retention* no longer keeps; return the steps deleted.

    The manifest goes first: from then on the step does not exist, and a crash leaves only files
    that the next save removes.
    """
    if retention == Retention():
        return []
    gone = retention.superseded(committed(store), newest)
    for step in gone:
        store.remove(f"{step_name(step)}/{MANIFEST}")
        store.remove(step_name(step))
    return gone
