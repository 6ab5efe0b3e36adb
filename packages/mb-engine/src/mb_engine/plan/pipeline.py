# SPDX-License-Identifier: Apache-2.0
"""Pipeline schedules: in which order a rank runs micro-batches, and how long it waits.

Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; the order is that of megatron-core
0.16.1, ``get_pp_rank_microbatches`` and ``get_schedule_table``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mb_engine.plan.activations import ChunkActivations
    from mb_engine.plan.layout import Degrees


def bubble_fraction(degrees: Degrees, num_microbatches: int) -> float:
    """Return the idle part of a step, ``b / (m + b)`` with ``b = (pp - 1) / vpp``.

    All stages are taken to need the same time, and backward twice that of forward.

    Source: Narayanan et al. 2021, section 2.2.2, where the bubble is given relative to the ideal
    time ``m``.
    """
    idle = (degrees.pp - 1) / degrees.vpp
    return idle / (num_microbatches + idle)


def passes(
    degrees: Degrees, *, pp_rank: int, num_microbatches: int, extra_warmup: int = 0
) -> Iterator[tuple[bool, int]]:
    """Yield (whether it is a forward pass, model chunk) in the order in which a rank runs them.

    Args:
        degrees: Of the job.
        pp_rank: The stage.
        num_microbatches: Of one step.
        extra_warmup: Further forward passes before the first backward pass, which
            ``overlap_moe_expert_parallel_comm`` asks for.
    """
    pp, vpp = degrees.pp, degrees.vpp
    order = list(_chunk_order(num_microbatches, chunks=vpp, group=pp))
    if pp == 1:
        warmup = 0
    elif vpp == 1:
        warmup = pp - pp_rank - 1
    else:
        warmup = 2 * (pp - pp_rank - 1) + (vpp - 1) * pp + extra_warmup
    warmup = min(warmup, len(order))
    backward = iter([vpp - 1 - chunk for chunk in order])
    for chunk in order[:warmup]:
        yield True, chunk
    for chunk in order[warmup:]:
        yield True, chunk
        yield False, next(backward)
    for chunk in backward:
        yield False, chunk


def activation_peak(
    chunks: Sequence[ChunkActivations], schedule: Iterator[tuple[bool, int]]
) -> float:
    """Return the most bytes of activations that a rank holds at once.

    Args:
        chunks: What a micro-batch keeps in each of the rank's model chunks.
        schedule: From :func:`passes`.
    """
    held = peak = 0.0
    kept = [c.kept for c in chunks]
    extra = [c.backward_peak() - c.kept for c in chunks]
    for forward, chunk in schedule:
        if forward:
            held += kept[chunk]
            peak = max(peak, held)
        else:
            peak = max(peak, held + extra[chunk])
            held -= kept[chunk]
    return peak + max(c.shared for c in chunks)


def _chunk_order(num_microbatches: int, *, chunks: int, group: int) -> Iterator[int]:
    """Yield the model chunk of each forward pass: *group* micro-batches a chunk in turn."""
    for start in range(0, num_microbatches, group):
        size = min(group, num_microbatches - start)
        for chunk in range(chunks):
            yield from [chunk] * size
