# SPDX-License-Identifier: Apache-2.0
"""The global order of samples: complete, the same for every layout, resumable anywhere."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mb_engine.data import DataError
from mb_engine.data.samplers import SampleOrder, permute, rank_positions, stream
from mb_engine.train.batch_size import BatchSizeSchedule

SMALL = [0, 4, 3, 1, 7, 6, 2, 5, 8, 9]
LARGE = [2495, 3361, 3983, 4344, 1533]


def everything(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.int64)


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 100))
def test_a_permutation_reaches_each_index_once(size, seed, epoch):
    shuffled = permute(everything(size), size, seed=seed, epoch=epoch)
    assert sorted(shuffled) == list(range(size))


def test_a_permutation_can_be_read_at_single_places_of_a_huge_range():
    size = 3_000_000_000_000
    places = np.array([0, 1, 2_999_999_999_999], dtype=np.int64)
    together = permute(places, size, seed=7)
    assert all(0 <= v < size for v in together)
    assert len(set(together.tolist())) == 3
    assert [int(permute(places[i : i + 1], size, seed=7)[0]) for i in range(3)] == list(together)


def test_the_order_is_the_same_on_every_machine_and_numpy_version():
    small = permute(everything(10), 10, seed=1234, epoch=1).tolist()
    large = permute(everything(5), 10_000, seed=1234, epoch=1).tolist()
    assert small == SMALL
    assert large == LARGE


def test_a_large_permutation_spreads_each_sample_evenly():
    size, epochs, bins = 1500, 600, 30
    counts = np.zeros((size, bins))
    for epoch in range(epochs):
        places = permute(everything(size), size, seed=3, epoch=epoch)
        counts[everything(size), places // (size // bins)] += 1
    expected = epochs / bins
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) * (bins - 1)
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [5, 12, 17])
def test_every_place_is_equally_likely_for_every_sample(size):
    epochs = 4000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[everything(size), permute(everything(size), size, seed=3, epoch=epoch)] += 1
    expected = epochs / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_together():
    shuffled = permute(everything(10_000), 10_000, seed=0)
    # of a uniform permutation, one pair on average keeps its distance of +1
    assert (np.diff(shuffled) == 1).sum() < 10
    assert abs(np.corrcoef(shuffled, everything(10_000))[0, 1]) < 0.05


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(permute(everything(50), 50, seed=s, epoch=e)) for s in range(5) for e in range(5)
    }
    assert len(orders) == 25


orders = st.builds(
    lambda size, batch, drop, shuffle, seed: SampleOrder.over(
        size + batch, batch_size=batch, drop_last=drop, shuffle=shuffle, seed=seed
    ),
    st.integers(0, 200),
    st.integers(1, 30),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)


@given(orders, st.integers(0, 3))
def test_an_epoch_reads_each_sample_at_most_once_and_no_more_than_a_batch_is_left_out(order, epoch):
    found = order.at(epoch * order.epoch_size + everything(order.epoch_size))
    assert len(set(found.index.tolist())) == order.epoch_size
    assert found.index.max() < order.size
    assert set(found.epoch.tolist()) == {epoch}


@given(st.integers(1, 300), st.booleans(), st.integers(0, 5))
def test_without_dropping_an_epoch_reads_each_sample_exactly_once(size, shuffle, epoch):
    order = SampleOrder.over(size, batch_size=7, drop_last=False, shuffle=shuffle, seed=1)
    found = order.at(epoch * size + everything(size))
    assert sorted(found.index.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [40, 4000])
def test_each_epoch_of_a_stream_has_an_order_of_its_own(size):
    order = SampleOrder.over(size, batch_size=4, drop_last=True, shuffle=True, seed=1)
    both = order.at(everything(2 * size)).index.reshape(2, size)
    assert (both[0] == both[1]).mean() < 0.2


def test_without_shuffling_the_data_is_read_as_it_lies():
    order = SampleOrder.over(5, batch_size=2, drop_last=True, shuffle=False, seed=1)
    assert order.at(everything(9)).index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("size", "message"), [(0, "no samples"), (3, "3 samples, fewer than one global batch of 4")]
)
def test_too_little_data_is_refused_with_a_remedy(size, message):
    with pytest.raises(DataError, match=message):
        SampleOrder.over(size, batch_size=4, drop_last=True, shuffle=True, seed=1)


def schedule(dp: int, *, ramp: bool) -> BatchSizeSchedule:
    return BatchSizeSchedule(
        target_batch_size=24,
        micro_batch_size=2,
        data_parallel_size=dp,
        rampup_batch_size=[8, 8, 70] if ramp else None,
    )


def read(order: SampleOrder, dp: int, *, micro: int = 2, ramp: bool, consumed: int, steps: int):
    """Return what all ranks together read: for each step, the samples in global order."""
    sizes = schedule(dp, ramp=ramp)
    ranks = [
        stream(
            order,
            consumed_samples=consumed,
            micro_batch_size=micro,
            global_batch_size=sizes.global_batch_size,
            dp_rank=rank,
            dp_size=dp,
        )
        for rank in range(dp)
    ]
    found = []
    for _ in range(steps):
        step = []
        for _ in range(sizes.global_batch_size(consumed) // (micro * dp)):
            for rank in ranks:
                samples = next(rank)
                step += zip(samples.epoch.tolist(), samples.index.tolist(), strict=True)
        consumed += sizes.global_batch_size(consumed)
        found.append(step)
    return found


@settings(max_examples=30)
@given(st.integers(24, 100), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 2]))
def test_all_ranks_together_read_the_global_order_for_any_number_of_ranks(
    size, drop, shuffle, ramp, micro
):
    order = SampleOrder.over(size, batch_size=24, drop_last=drop, shuffle=shuffle, seed=5)
    sizes = schedule(1, ramp=ramp)
    steps, total = 9, sizes.samples_at_iteration(9)
    whole = order.at(everything(total))
    expected = list(zip(whole.epoch.tolist(), whole.index.tolist(), strict=True))
    for dp in (1, 2, 4):
        found = read(order, dp, micro=micro, ramp=ramp, consumed=0, steps=steps)
        assert [sample for step in found for sample in step] == expected


@settings(max_examples=30)
@given(
    st.integers(24, 100), st.booleans(), st.booleans(), st.integers(0, 8), st.sampled_from([2, 4])
)
def test_resuming_under_another_layout_goes_on_with_the_next_sample(size, drop, ramp, stop, dp):
    order = SampleOrder.over(size, batch_size=24, drop_last=drop, shuffle=True, seed=5)
    straight = read(order, 1, ramp=ramp, consumed=0, steps=10)
    consumed = schedule(1, ramp=ramp).samples_at_iteration(stop)
    resumed = read(order, dp, ramp=ramp, consumed=consumed, steps=10 - stop)
    assert resumed == straight[stop:]


def test_reading_ahead_in_blocks_changes_nothing():
    order = SampleOrder.over(3000, batch_size=700, drop_last=False, shuffle=True, seed=5)
    found = stream(
        order, consumed_samples=11, micro_batch_size=700, global_batch_size=lambda _: 700
    )
    for step, samples in enumerate(islice(found, 12)):
        expected = order.at(11 + 700 * step + everything(700))
        assert samples.index.tolist() == expected.index.tolist()
        assert samples.epoch.tolist() == expected.epoch.tolist()


def test_a_rank_reads_rows_of_its_own():
    rows = rank_positions(100, 12, micro_batch_size=3, dp_rank=1, dp_size=2)
    assert rows.tolist() == [[103, 104, 105], [109, 110, 111]]


def test_a_batch_that_does_not_divide_is_refused():
    order = SampleOrder.over(50, batch_size=10, drop_last=True, shuffle=True, seed=1)
    uneven = stream(
        order, consumed_samples=0, micro_batch_size=2, global_batch_size=lambda _: 10, dp_size=2
    )
    with pytest.raises(DataError, match=r"10 is not a multiple of .* 2 \* 2"):
        list(islice(uneven, 1))
