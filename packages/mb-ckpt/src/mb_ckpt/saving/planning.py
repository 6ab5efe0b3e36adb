# SPDX-License-Identifier: Apache-2.0
"""Which rank stores which values: everything once, and the bytes spread over those that have it.

A plan depends on the structure of the state alone. It is made on rank 0 from what all ranks offer,
and kept for as long as no rank's structure changes.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from mb_ckpt.collector import paused
from mb_ckpt.errors import CheckpointError
from mb_ckpt.format.packed import ALIGNMENT
from mb_ckpt.states.boxes import Box, cover_fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mb_ckpt.ranks import Ranks
    from mb_ckpt.states.pieces import Spec

SPREAD_BYTES = 4 << 10
"""Replicated pieces below this stay with the rank that has ``replica_id=0``."""
SPLIT_BYTES = 8 << 20
"""Replicated pieces from this on are split by rows among the ranks that have them."""


@frozen
class Part:
    """What one rank stores of one of its pieces.

    Attributes:
        index: Of the piece among the rank's own.
        start: First byte in the rank's buffer.
        boxes: Where the values belong, in the order of the bytes.
        rows: ``(dimension, first, count)`` if only those rows of the piece, else None.
    """

    index: int
    start: int
    boxes: tuple[Box, ...]
    rows: tuple[int, int, int] | None = None


@frozen(kw_only=True)
class StoredTensor:
    """One global tensor, and which rank stores what of it.

    Attributes:
        dtype: As torch prints it, without the prefix.
        shape: Of the whole tensor.
        chunks: Rank, first byte in its buffer, and box.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: list[tuple[int, int, Box]] = field(factory=list)


@frozen(kw_only=True, eq=False)
class Plan:
    """Who stores what.

    Attributes:
        shares: The parts of each rank.
        totals: Bytes of each rank's buffer.
        tensors: By key.
    """

    shares: list[list[Part]]
    totals: list[int]
    tensors: dict[str, StoredTensor] = field(repr=False)


@frozen(kw_only=True, eq=False)
class Share:
    """A rank's part of a plan, good for as long as its pieces have the very same specs.

    Attributes:
        specs: Of the rank's pieces.
        rank: Of this rank.
        plan: The whole plan.
    """

    specs: list[Spec]
    rank: int
    plan: Plan

    @property
    def parts(self) -> list[Part]:
        """What this rank stores."""
        return self.plan.shares[self.rank]

    @cached_property
    def is_all(self) -> bool:
        """Whether this rank stores all of its pieces, each as it is, in their order."""
        every = [part.index for part in self.parts] == list(range(len(self.specs)))
        return every and all(part.rows is None for part in self.parts)

    @property
    def total(self) -> int:
        """Bytes of this rank's buffer."""
        return self.plan.totals[self.rank]


def agree(ranks: Ranks, step: int, specs: list[Spec], known: Share | None, error: str) -> Share:
    """Return this rank's share of a plan that all ranks follow; a collective call.

    Args:
        ranks: Those that save together.
        step: Which all of them must be saving.
        specs: Of this rank's pieces.
        known: What this returned the last time.
        error: Why this rank cannot save, or empty.

    Raises:
        CheckpointError: On every rank if one of them cannot save, or their states do not fit.
    """
    known = known if known is not None and known.specs == specs else None
    asked = ranks.gather((step, known is None, error))
    again = ranks.from_first(lambda: _changed(step, asked))
    if not again and known is not None:
        return known
    offers = ranks.gather(specs)
    plan = ranks.from_first(lambda: _planned(step, offers))
    return Share(specs=specs, rank=ranks.rank, plan=plan)


def _changed(step: int, asked: Sequence[tuple[int, bool, str]]) -> bool:
    failed = [f"rank {rank}: {error}" for rank, (_, _, error) in enumerate(asked) if error]
    if failed:
        raise CheckpointError(f"step {step} was not saved: {'; '.join(failed)}")
    steps = [one for one, _, _ in asked]
    if len(set(steps)) > 1:
        raise CheckpointError(f"ranks saved different steps at once, {steps}: save on all together")
    return any(changed for _, changed, _ in asked)


def _planned(step: int, offers: Sequence[Sequence[Spec]]) -> Plan:
    try:
        with paused():
            return make_plan(offers)
    except CheckpointError as e:
        raise CheckpointError(f"step {step} was not saved: {e}") from e


def make_plan(offers: Sequence[Sequence[Spec]]) -> Plan:
    """Return who stores what of *offers*, the pieces of every rank.

    Pieces that several ranks have go, the largest first, to whichever of them has least to store;
    from 8 MiB on in slices. Small ones, and buffers of modules, stay with the first replica.

    Raises:
        CheckpointError: If pieces contradict each other or do not make up whole tensors.
    """
    tensors = _kinds(offers)
    _check_plain(offers)
    chosen: list[list[tuple[int, tuple[Box, ...], tuple[int, int, int] | None]]]
    chosen = [[] for _ in offers]
    loads = [0] * len(offers)
    shared: list[list[tuple[int, int]]] = []
    for holders in _holders(offers):
        first = [(rank, i) for rank, i in holders if _is_first(rank, offers[rank][i])]
        spec = offers[holders[0][0]][holders[0][1]]
        spread = len(holders) > 1 and spec.nbytes >= SPREAD_BYTES and not spec.fixed
        if spread and len(first) == 1:
            shared.append(holders)
            continue
        for rank, i in first:
            chosen[rank].append((i, offers[rank][i].boxes, None))
            loads[rank] += spec.nbytes
    # The largest first, and those that can be split last of all: they fill the gaps.
    shared.sort(key=lambda holders: -offers[holders[0][0]][holders[0][1]].nbytes)
    large = []
    for holders in shared:
        spec = offers[holders[0][0]][holders[0][1]]
        if _split_dimension(spec) is not None:
            large.append(holders)
            continue
        rank, i = min(holders, key=lambda one: (loads[one[0]], one[0]))
        chosen[rank].append((i, spec.boxes, None))
        loads[rank] += spec.nbytes
    for holders in large:
        spec = offers[holders[0][0]][holders[0][1]]
        for (rank, i), boxes, rows, nbytes in _slices(spec, holders, loads):
            chosen[rank].append((i, boxes, rows))
            loads[rank] += nbytes
    return _placed(offers, chosen, tensors)


def _is_first(rank: int, spec: Spec) -> bool:
    return rank == 0 if spec.plain else spec.replica_id == 0


def _kinds(offers: Iterable[Sequence[Spec]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for rank, specs in enumerate(offers):
        for spec in specs:
            known = tensors.get(spec.key)
            if known is None:
                tensors[spec.key] = StoredTensor(dtype=spec.dtype, shape=spec.shape)
            elif (known.dtype, known.shape) != (spec.dtype, spec.shape):
                raise CheckpointError(
                    f"tensor {spec.key!r} is {spec.dtype}{list(spec.shape)} on rank {rank} but "
                    f"{known.dtype}{list(known.shape)} elsewhere: give it one key on all ranks"
                )
    return tensors


def _check_plain(offers: Sequence[Sequence[Spec]]) -> None:
    """Refuse plain tensors that only a later rank has: rank 0 could not load them back."""
    first = {spec.key for spec in offers[0] if spec.plain}
    for rank, specs in enumerate(offers[1:], 1):
        for spec in specs:
            if spec.plain and spec.key not in first:
                raise CheckpointError(
                    f"plain tensor {spec.key!r} is on rank {rank} but not on rank 0, which stores "
                    "plain tensors: make it a TensorShard with a key of its own"
                )


def _holders(offers: Sequence[Sequence[Spec]]) -> Iterable[list[tuple[int, int]]]:
    """Return, for each different piece, the ranks that have it and its index there."""
    if len(offers) == 1:
        same: dict[Any, list[tuple[int, int]]] = {}
        out = []
        for i, spec in enumerate(offers[0]):
            if spec.replica_id:
                same.setdefault((spec.key, spec.boxes), []).append((0, i))
            else:
                out.append([(0, i)])
        return [*out, *same.values()]
    found: dict[Any, list[tuple[int, int]]] = {}
    for rank, specs in enumerate(offers):
        for i, spec in enumerate(specs):
            found.setdefault((spec.key, spec.boxes), []).append((rank, i))
    return found.values()


def _split_dimension(spec: Spec) -> int | None:
    """Return the dimension whose rows *spec* can be split by, None if it is to stay whole."""
    if spec.nbytes < SPLIT_BYTES or spec.held != spec.boxes[0].shape:  # small, or a flat range
        return None
    return next((d for d, n in enumerate(spec.held) if n > 1), None)


def _slices(
    spec: Spec, holders: list[tuple[int, int]], loads: Sequence[int]
) -> Iterable[tuple[tuple[int, int], tuple[Box, ...], tuple[int, int, int], int]]:
    """Yield holder, boxes, rows and bytes of the parts that bring *holders* to one level."""
    box, along = spec.boxes[0], _split_dimension(spec)
    assert along is not None
    extent = box.shape[along]
    width = spec.nbytes // extent
    order = sorted(holders, key=lambda one: (loads[one[0]], one[0]))
    taken, below = 1, loads[order[0][0]]
    while taken < len(order):  # how many holders lie below the level that all bytes fill up to
        if (below + spec.nbytes) / taken <= loads[order[taken][0]]:
            break
        below += loads[order[taken][0]]
        taken += 1
    level, low = (below + spec.nbytes) / taken, 0
    for k, holder in enumerate(order[:taken]):
        high = extent
        if k < taken - 1:
            high = min(extent, low + round((level - loads[holder[0]]) / width))
        if high <= low:
            continue
        offset, shape = list(box.offset), list(box.shape)
        offset[along] += low
        shape[along] = high - low
        part = Box(tuple(offset), tuple(shape))
        yield holder, (part,), (along, low, high - low), width * (high - low)
        low = high


def _placed(
    offers: Sequence[Sequence[Spec]], chosen: Sequence[list[Any]], tensors: dict[str, StoredTensor]
) -> Plan:
    """Lay each rank's parts out in its buffer, and check that they make up whole tensors."""
    shares, totals = [], []
    for rank, own in enumerate(chosen):
        parts, end = [], 0
        for i, boxes, rows in sorted(own, key=lambda one: (one[0], one[2] or ())):
            spec = offers[rank][i]
            parts.append(Part(i, end, boxes, rows))
            volume = max(1, sum(box.volume for box in spec.boxes))
            width, start = spec.nbytes // volume, end
            chunks = tensors[spec.key].chunks
            for box in boxes:
                chunks.append((rank, start, box))
                start += box.volume * width
            end += -(-(start - end) // ALIGNMENT) * ALIGNMENT
        shares.append(parts)
        totals.append(end)
    for key, tensor in tensors.items():
        fault = cover_fault(tensor.shape, [box for _, _, box in tensor.chunks])
        if fault:
            raise CheckpointError(f"tensor {key!r}{list(tensor.shape)} cannot be saved: {fault}")
    return Plan(shares=shares, totals=totals, tensors=tensors)
