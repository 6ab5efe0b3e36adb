# SPDX-License-Identifier: Apache-2.0
"""What the scores of an attention become before they weigh values, and who sees whom.

Shape suffixes, all local to the rank: S = query tokens, T = key tokens.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from attrs import frozen

if TYPE_CHECKING:
    from torch import Tensor


@frozen(kw_only=True)
class Scoring:
    """How one attention turns queries and keys into probabilities.

    Queries are the last ones of the keys, as in a sequence whose earlier part is known: query i is
    at position ``i + T - S``.

    Attributes:
        scale: Factor of the scores.
        causal: Hide later keys.
        window: Tokens seen to the left and to the right, -1 for all; None for no window.
        cap: Bend scores to ``cap * tanh(score / cap)``; None leaves them.
            Source: Gemma 2, arXiv:2408.00118, section 2.
    """

    scale: float
    causal: bool = True
    window: tuple[int, int] | None = None
    cap: float | None = None

    @property
    def reach(self) -> tuple[int, int]:
        """Tokens seen to the left and to the right, -1 for all."""
        left, right = self.window or (-1, -1)
        return left, 0 if self.causal else right

    def seen(self, first: int, end: int, *, queries: int, keys: int) -> tuple[int, int]:
        """Return the range of keys that queries *first* to *end* see between them."""
        left, right = self.reach
        offset = keys - queries
        start = 0 if left < 0 else max(0, first + offset - left)
        stop = keys if right < 0 else min(keys, end + offset + right)
        return start, stop

    def hides(self, first: int, end: int, *, queries: int, keys: int) -> bool:
        """Return whether one of queries *first* to *end* does not see all of :meth:`seen`."""
        left, right = self.reach
        offset = keys - queries
        start, stop = self.seen(first, end, queries=queries, keys=keys)
        hidden_left = left >= 0 and start < end - 1 + offset - left
        return hidden_left or (right >= 0 and stop > first + offset + right + 1)


@functools.lru_cache(maxsize=16)
def visible_keys(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    device: torch.device,
) -> Tensor:
    """Return which key each query sees, bool ``[S, T]``; True where it does.

    Queries are the last ones of the keys, as in a sequence whose earlier part is known.

    Args:
        queries: S.
        keys: T, at least S.
        causal: Hide later keys.
        window: Tokens seen to the left and to the right; -1 for all.
        device: Of the result.
    """
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = torch.arange(keys, device=device)[None, :] - position
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    left, right = window or (-1, -1)
    if left >= 0:
        visible &= distance >= -left
    if causal or right >= 0:
        visible &= distance <= (0 if causal else right)
    return visible
