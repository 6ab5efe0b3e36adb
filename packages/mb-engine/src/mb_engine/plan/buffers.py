# SPDX-License-Identifier: Apache-2.0
"""Gradient buffers of a model chunk and what the distributed optimizer makes of them.

Source: megatron-core 0.16.1, ``_ParamAndGradBuffer`` and ``DistributedOptimizer``: parameters lie in
reverse order; with the distributed optimizer each begins at a multiple of 64 elements, a bucket
ends at a multiple of lcm(replicas, 128), a tied embedding has a bucket of its own, and replica i
owns the i-th part of each bucket.
"""

from __future__ import annotations

import bisect
import itertools
import math
from typing import TYPE_CHECKING

from attrs import frozen

from mb_engine.plan.layout import lcm_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_engine.plan.parameters import Parameter

_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
_BUSY_ALIGNMENT = 1 << 16


@frozen(kw_only=True)
class GradientBuffer:
    """One contiguous buffer of gradients.

    Attributes:
        elements: With padding.
        used: Without padding.
        buckets: First and last element + 1 of each bucket.
        pieces: First element and elements of each parameter.
        before: Used elements before each parameter.
    """

    elements: int
    used: int
    buckets: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[int, int], ...]
    before: tuple[int, ...]

    def owned(self, replica: int, replicas: int) -> int:
        """Return how many elements one replica's optimizer owns, its part of each bucket."""
        elements = 0
        for start, stop in self.buckets:
            share = (stop - start) // replicas
            low = start + replica * share
            elements += self._used_below(low + share) - self._used_below(low)
        return elements

    def _used_below(self, end: int) -> int:
        at = bisect.bisect_right(self.pieces, (end, 0)) - 1
        if at < 0:
            return 0
        start, size = self.pieces[at]
        return self.before[at] + min(size, end - start)


def gradient_buffer(
    parameters: Sequence[Parameter],
    *,
    distributed: bool,
    replicas: int,
    bucket_size: int | None,
    for_busy_links: bool = False,
) -> GradientBuffer:
    """Return the buffer that holds the gradients of *parameters*.

    Args:
        parameters: In the order of the model; all of one dtype and one set of replicas.
        distributed: Whether the optimizer's state is shared among replicas.
        replicas: Ranks that hold the same parameters.
        bucket_size: Elements after which a bucket ends; None for a single bucket.
        for_busy_links: ``ddp.pad_buckets_for_high_nccl_busbw``.
    """
    alignment = math.lcm(replicas, _BUCKET_ALIGNMENT, _BUSY_ALIGNMENT if for_busy_links else 1)
    pieces: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start, filled, at = 0, False, 0

    def close(end: int) -> int:
        nonlocal bucket_start, filled
        if distributed:
            end = lcm_up(end, alignment)
        buckets.append((bucket_start, end))
        bucket_start, filled = end, False
        return end

    for parameter in reversed(parameters):
        alone = distributed and parameter.tied
        if distributed:
            at = lcm_up(at, _PARAMETER_ALIGNMENT)
        if alone and filled:
            at = close(at)
        pieces.append((at, parameter.size))
        at += parameter.size
        filled = True
        if alone or (bucket_size is not None and at - bucket_start >= bucket_size):
            at = close(at)
    if filled:
        at = close(at)
    return GradientBuffer(
        elements=at,
        used=sum(p.size for p in parameters),
        buckets=tuple(buckets),
        pieces=tuple(pieces),
        before=tuple(itertools.accumulate((size for _, size in pieces[:-1]), initial=0)),
    )
