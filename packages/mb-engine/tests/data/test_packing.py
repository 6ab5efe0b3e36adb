# SPDX-License-Identifier: Apache-2.0
"""Packing and balance against what defines them, exact optima, bounds and shuffled order."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mb_engine.data import DataError
from mb_engine.data.packing import assign, imbalance, pack, spread

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def lognormal(count, capacity, seed=0):
    drawn = np.random.default_rng(seed).lognormal(5.5, 1.0, count).astype(int) + 1
    return np.minimum(drawn, capacity)


def fewest_bins(lengths, capacity):
    """Return the exact optimum, by trying all ways to place the samples."""
    best = len(lengths)
    sizes = sorted(lengths, reverse=True)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(sizes):
            best = len(rooms)
            return
        for room in sorted({r for r in rooms if r >= sizes[i]}):
            rest = list(rooms)
            rest.remove(room)
            place(i + 1, [*rest, room - sizes[i]])
        place(i + 1, [*rooms, capacity - sizes[i]])

    place(0, [])
    return best


def best_fit_decreasing(lengths, capacity):
    """Return the number of bins of the textbook loop, sample by sample."""
    rooms = []
    for size in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting)[1]] -= size
        else:
            rooms.append(capacity - size)
    return len(rooms)


class TestPack:
    @given(LENGTHS, st.integers(40, 100))
    def test_each_sample_is_in_one_bin_and_no_bin_holds_too_much(self, lengths, capacity):
        packed = pack(lengths, capacity)
        assert sorted(packed.order) == list(range(len(lengths)))
        for number in range(len(packed)):
            held = packed.bin(number)
            assert 0 < sum(lengths[i] for i in held) <= capacity
            assert list(held) == sorted(held)

    @given(LENGTHS, st.integers(40, 100))
    def test_bins_are_as_many_as_the_textbook_loop_makes(self, lengths, capacity):
        assert len(pack(lengths, capacity)) == best_fit_decreasing(lengths, capacity)

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(20, 30))
    def test_bins_are_near_the_exact_optimum(self, lengths, capacity):
        optimum = fewest_bins(lengths, capacity)
        assert optimum <= len(pack(lengths, capacity)) <= 11 / 9 * optimum + 6 / 9

    @pytest.mark.parametrize("capacity", [2048, 4096, 8192])
    def test_lognormal_lengths_leave_less_than_a_hundredth_empty(self, capacity):
        packed = pack(lognormal(20_000, capacity), capacity)
        assert packed.efficiency > 0.99
        assert len(packed) <= packed.lower_bound * 1.01

    def test_what_is_told_is_so(self):
        packed = pack([6, 5, 4, 3, 2], 10)
        assert packed.report() == {
            "samples": 5,
            "bins": 2,
            "capacity": 10,
            "efficiency": 1.0,
            "lower_bound": 2,
            "samples_per_bin": 2.5,
        }

    def test_time_grows_little_faster_than_the_number_of_samples(self):
        lengths = lognormal(100_000, 4096)
        begun = time.perf_counter()
        pack(lengths, 4096)
        assert (
            time.perf_counter() - begun < 2.0
        )  # a million in 10 s, ten times as much; it takes 0.05

    def test_nothing_makes_no_bins(self):
        assert len(pack([], 8)) == 0

    @pytest.mark.parametrize(("lengths", "worst"), [([3, 9], 9), ([3, 0], 0)])
    def test_what_does_not_fit_is_refused(self, lengths, worst):
        with pytest.raises(DataError, match=rf"sample of {worst} tokens cannot be packed into"):
            pack(lengths, 8)


class TestSpread:
    @given(LENGTHS, st.integers(1, 8))
    def test_the_longest_row_is_within_a_third_of_what_must_be(self, lengths, rows):
        found = spread(lengths, rows)
        assert len(found) == rows
        assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
        longest = max(sum(lengths[i] for i in row) for row in found)
        # Graham's bound holds against the optimum, which is no less than any of these
        at_least = max([*lengths, -(-sum(lengths) // rows)])
        if len(lengths) > rows:
            at_least = max(at_least, sum(sorted(lengths, reverse=True)[rows - 1 : rows + 1]))
        assert longest <= 4 / 3 * at_least + max(lengths) / 3

    def test_equal_samples_are_dealt_in_turn(self):
        assert [list(row) for row in spread([5] * 6, 3)] == [[0, 3], [1, 4], [2, 5]]


class TestAssign:
    @given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
    def test_each_row_is_read_once(self, micro_batches, ranks, seed):
        costs = np.random.default_rng(seed).integers(1, 100, micro_batches * ranks)
        table = assign(costs, costs, ranks)
        assert table.shape == (micro_batches, ranks)
        assert sorted(table.flat) == list(range(micro_batches * ranks))

    def test_ranks_and_micro_batches_are_balanced_where_shuffled_rows_are_not(self):
        """Over 40 steps of 64 rows on 8 ranks: attention, tokens of the loss, and each micro-batch."""
        rng = np.random.default_rng(0)
        lengths = lognormal(40_000, 4096)
        packed = pack(lengths, 4096)
        order = rng.permutation(len(packed))
        share = rng.uniform(0.2, 0.8, len(lengths))
        cost = np.array([(lengths[packed.bin(b)] ** 2).sum() for b in order], dtype=float)
        loss = np.array([(lengths * share)[packed.bin(b)].sum() for b in order])
        seen = []
        for step in range(40):
            rows = slice(step * 64, step * 64 + 64)
            table = assign(cost[rows], loss[rows], 8)
            plain = np.arange(64).reshape(8, 8)
            seen.append(
                [
                    (imbalance(w[rows][t]), (w[rows][t].max(1) / w[rows][t].mean(1)).mean())
                    for t in (table, plain)
                    for w in (cost, loss)
                ]
            )
        (cost_by_rank, cost_by_batch), (loss_by_rank, _) = np.mean(seen, axis=0)[:2]
        (plain_by_rank, plain_by_batch), (plain_loss, _) = np.mean(seen, axis=0)[2:]
        assert plain_by_rank > 0.25
        assert cost_by_rank < plain_by_rank / 4
        assert loss_by_rank < plain_loss / 3
        assert cost_by_batch - 1 < (plain_by_batch - 1) / 4

    def test_imbalance_is_what_the_most_loaded_rank_has_above_the_mean(self):
        assert imbalance([[1, 3], [1, 3]]) == pytest.approx(0.5)
        assert imbalance([[0, 0]]) == 0
