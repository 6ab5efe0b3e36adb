# SPDX-License-Identifier: Apache-2.0
"""Who stores what: everything once, and no rank much more than the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mb_ckpt.errors import CheckpointError
from mb_ckpt.saving import planning
from mb_ckpt.saving.planning import make_plan
from mb_ckpt.states.boxes import Box
from mb_ckpt.states.pieces import Spec, whole


def spec(key, shape, *, replica=0, plain=False, fixed=False):
    count = int(np.prod(shape))
    return Spec(
        key=key, dtype="float32", shape=shape, boxes=(Box((0,) * len(shape), shape),), held=shape,
        nbytes=4 * count, replica_id=replica, plain=plain, fixed=fixed,
    )  # fmt: skip


@st.composite
def offers(draw):
    """Pieces of up to 12 tensors, each on some of up to 5 ranks."""
    ranks = draw(st.integers(1, 5))
    out = [[] for _ in range(ranks)]
    for i in range(draw(st.integers(1, 12))):
        shape = (draw(st.integers(1, 90)), draw(st.integers(1, 100)))
        holders = draw(st.sets(st.integers(0, ranks - 1), min_size=1))
        for replica, rank in enumerate(sorted(holders)):
            out[rank].append(spec(f"t{i}", shape, replica=replica))
    return out


@given(offers(), st.sampled_from([1 << 10, 1 << 13, 1 << 23]))
def test_every_element_is_stored_once_by_a_rank_that_has_it(given_offers, split):
    old, planning.SPLIT_BYTES = planning.SPLIT_BYTES, split
    try:
        plan = make_plan(given_offers)
    finally:
        planning.SPLIT_BYTES = old
    stored = {}
    for rank, parts in enumerate(plan.shares):
        end = 0
        for part in parts:
            piece = given_offers[rank][part.index]
            by_rows, by_box = stored.setdefault(
                piece.key, (np.zeros(piece.shape, int), np.zeros(piece.shape, int))
            )
            assert part.start % planning.ALIGNMENT == 0
            assert part.start >= end
            _narrowed(by_rows, *(part.rows or (0, 0, piece.shape[0])))[...] += 1
            (box,) = part.boxes
            by_box[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] += 1
            end = part.start + 4 * box.volume
        assert plan.totals[rank] >= end
    keys = {piece.key for specs in given_offers for piece in specs}
    assert stored.keys() == keys
    assert all((counts == 1).all() for pair in stored.values() for counts in pair)


def _narrowed(array, dimension, first, count):
    return array[(slice(None),) * dimension + (slice(first, first + count),)]


def test_what_all_ranks_have_is_spread_evenly_whatever_the_sizes():
    sizes = [3, 40, 7, 1000, 250, 250, 90, 11, 600, 5, 5, 700]
    same = [[spec(f"t{i}", (n, 4096), plain=True) for i, n in enumerate(sizes)] for _ in range(4)]
    plan = make_plan(same)
    assert sum(plan.totals) == 4 * 4096 * sum(sizes)
    # The three that are split fill the gaps that the others leave, to within a row of 16 KiB each.
    assert max(plan.totals) - min(plan.totals) <= 3 * 4 * 4096


def test_a_large_tensor_is_split_among_the_ranks_that_have_it():
    rows = planning.SPLIT_BYTES // 4096 * 4
    plan = make_plan([[spec("w", (1, rows, 1024), replica=r)] for r in range(4)])
    assert set(plan.totals) == {rows * 4096 // 4}
    assert [box.offset for _, _, box in plan.tensors["w"].chunks] == [
        (0, rows * k // 4, 0) for k in range(4)
    ]


@pytest.mark.parametrize("kind", [{"fixed": True}, {}], ids=["buffer", "small"])
def test_buffers_and_small_tensors_stay_with_the_first_rank(kind):
    shape = (100, 1000) if kind else (10, 10)
    same = [[spec("w", shape, plain=True, **kind)] for _ in range(3)]
    assert make_plan(same).totals[1:] == [0, 0]


def test_buffers_of_modules_are_fixed():
    from mb_ckpt.states.flattening import flatten

    flat = flatten({"m": torch.nn.BatchNorm1d(3), "t": torch.ones(1)})
    assert {s.key for s in flat.specs if s.fixed} == {
        "m.running_mean", "m.running_var", "m.num_batches_tracked",
    }  # fmt: skip
    assert [flat.specs[i].key for i in flat.changing] == [s.key for s in flat.specs if s.fixed]


def test_what_does_not_make_up_whole_tensors_is_refused():
    with pytest.raises(CheckpointError, match=r"'w'\[3\] cannot be saved: two pieces overlap"):
        make_plan([[spec("w", (3,))], [spec("w", (3,))]])
    with pytest.raises(CheckpointError, match="hold 0 of 3 elements"):
        make_plan([[spec("w", (3,), replica=1)], []])
    with pytest.raises(CheckpointError, match=r"'w' is float32\[4\] on rank 1 but float32\[3\]"):
        make_plan([[spec("w", (3,))], [spec("w", (4,))]])
    alone = whole(torch.ones(2), "p")
    with pytest.raises(CheckpointError, match="'p' is on rank 1 but not on rank 0"):
        make_plan([[], [alone]])
