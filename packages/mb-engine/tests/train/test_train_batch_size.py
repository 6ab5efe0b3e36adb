# SPDX-License-Identifier: Apache-2.0
"""The batch-size schedule against megatron-core's calculators and a step-by-step count."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mb_config.errors import ConfigError
from mb_engine.runtime.megatron_compat import prepare_megatron
from mb_engine.runtime.megatron_cpu import install
from mb_engine.train.batch_size import BatchSizeSchedule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core and torch.jit warn when imported
    install()
    prepare_megatron()
    from megatron.core import num_microbatches_calculator as megatron


@st.composite
def ramps(draw: st.DrawFn, *, decrease: bool | None = None) -> BatchSizeSchedule:
    micro, dp = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    unit = micro * dp
    decrease = draw(st.booleans()) if decrease is None else decrease
    if decrease:
        start = draw(st.integers(unit, 4 * unit))
        increment = draw(st.integers(1, 20))
    else:
        start = unit * draw(st.integers(1, 4))
        increment = unit * draw(st.integers(1, 4))
    return BatchSizeSchedule(
        target_batch_size=start + increment * draw(st.integers(1, 9)),
        micro_batch_size=micro,
        data_parallel_size=dp,
        rampup_batch_size=[start, increment, draw(st.integers(1, 3000))],
        decrease_batch_size_if_needed=decrease,
    )


def count_steps(schedule: BatchSizeSchedule, steps: int) -> list[int]:
    """Return the samples consumed after 0, 1, ... steps, one step at a time."""
    consumed = [0]
    for _ in range(steps):
        consumed.append(consumed[-1] + schedule.global_batch_size(consumed[-1]))
    return consumed


@pytest.mark.skipif(
    not hasattr(megatron, "RampupBatchsizeNumMicroBatchesCalculator"),
    reason="this megatron-core has no ramp-up any more",
)
@given(ramps(), st.integers(0, 4000))
def test_ramp_up_equals_megatron_where_float64_division_is_exact(schedule, consumed):
    start, increment, samples = schedule.rampup_batch_size
    increments = (schedule.target_batch_size - start) // increment
    # megatron-core computes c / (samples / n), which may round an integer quotient down
    assume(consumed > samples or consumed * increments % samples != 0 or consumed == 0)
    oracle = megatron.RampupBatchsizeNumMicroBatchesCalculator(
        schedule.target_batch_size,
        schedule.micro_batch_size,
        schedule.data_parallel_size,
        schedule.decrease_batch_size_if_needed,
        1,
        start,
        increment,
        samples,
    )
    oracle.update(consumed, consistency_check=True)
    assert schedule.global_batch_size(consumed) == oracle.get_current_running_global_batch_size()
    assert schedule.num_microbatches(consumed) == oracle.get()


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_constant_size_equals_megatron_or_is_refused_where_megatron_asserts(
    size, micro, dp, decrease
):
    try:
        oracle = megatron.ConstantNumMicroBatchesCalculator(size, micro, dp, decrease, 1)
    except AssertionError:
        with pytest.raises(
            ConfigError, match=rf"train.global_batch_size={size}: .*{micro} \* {dp}"
        ):
            BatchSizeSchedule(
                target_batch_size=size,
                micro_batch_size=micro,
                data_parallel_size=dp,
                decrease_batch_size_if_needed=decrease,
            )
        return
    schedule = BatchSizeSchedule(
        target_batch_size=size,
        micro_batch_size=micro,
        data_parallel_size=dp,
        decrease_batch_size_if_needed=decrease,
    )
    assert schedule.global_batch_size(10**9) == oracle.get_current_running_global_batch_size()
    assert schedule.num_microbatches(0) == oracle.get()


def test_a_ramp_has_equal_stages():
    schedule = BatchSizeSchedule(target_batch_size=16, rampup_batch_size=[4, 4, 30])
    sizes = [schedule.global_batch_size(c) for c in range(40)]
    assert sizes == [4] * 10 + [8] * 10 + [12] * 10 + [16] * 10
    assert [schedule.samples_at_iteration(i) for i in range(7)] == [0, 4, 8, 12, 20, 32, 48]


def test_an_integer_quotient_is_not_rounded_down():
    # 3 * (21 / 98181 of the ramp): float64 gives 6.999..., and megatron-core one increment less
    schedule = BatchSizeSchedule(target_batch_size=22, rampup_batch_size=[1, 1, 98181])
    assert schedule.global_batch_size(32726) == 7
    assert schedule.global_batch_size(32727) == 8


@given(ramps(), st.integers(0, 400))
def test_samples_at_an_iteration_equal_a_count_step_by_step(schedule, iteration):
    assert schedule.samples_at_iteration(iteration) == count_steps(schedule, iteration)[-1]


@given(ramps(), st.integers(0, 5000))
def test_iterations_for_samples_is_the_last_whole_step_within_them(schedule, samples):
    counted = count_steps(schedule, samples + 1)
    steps = schedule.iterations_for_samples(samples)
    assert counted[steps] <= samples < counted[steps + 1]


@given(ramps())
def test_sizes_never_shrink_and_end_at_the_target(schedule):
    sizes = [schedule.global_batch_size(c) for c in range(schedule.rampup_batch_size[2] + 2)]
    unit = schedule.samples_per_microstep
    assert sizes == sorted(sizes)
    assert sizes[-2:] == [schedule.target_batch_size // unit * unit] * 2


def test_a_constant_size_counts_steps_by_division():
    schedule = BatchSizeSchedule(target_batch_size=8, micro_batch_size=2, data_parallel_size=2)
    assert schedule.num_microbatches(123) == 2
    assert schedule.samples_at_iteration(7) == 56
    assert schedule.iterations_for_samples(63) == 7
    assert schedule.iterations_for_samples(64) == 8


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(1, 16, 2), (1, 17, 3), (2, 17, 6), (0.5, 17, 2), (1.5, 16, 3)]
)
def test_epochs_count_a_partial_batch_as_a_step(epochs, samples, steps):
    schedule = BatchSizeSchedule(target_batch_size=8)
    assert schedule.iterations_for_epochs(epochs, samples) == steps


@given(ramps(), st.integers(1, 2000), st.sampled_from([0.5, 1, 2]))
def test_epochs_under_ramp_up_end_with_the_step_that_completes_them(schedule, samples, epochs):
    steps = schedule.iterations_for_epochs(epochs, samples)
    assert schedule.samples_at_iteration(steps) >= epochs * samples
    assert schedule.samples_at_iteration(steps - 1) < epochs * samples


def test_a_ramp_of_zero_samples_or_no_increment_is_constant():
    for ramp in ([4, 4, 0], [16, 4, 100]):
        schedule = BatchSizeSchedule(target_batch_size=16, rampup_batch_size=ramp)
        assert {schedule.global_batch_size(c) for c in range(200)} == {16}


@pytest.mark.parametrize("ramp", [[4, 5, 10], [20, 4, 10], [0, 4, 10], [4, 0, 10], [4, 4, -1], [4]])
def test_a_ramp_that_cannot_reach_the_target_is_refused(ramp):
    with pytest.raises(ConfigError, match=r"train.rampup_batch_size=.*whole increments"):
        BatchSizeSchedule(target_batch_size=16, rampup_batch_size=ramp)


def test_an_indivisible_size_within_the_ramp_is_refused_at_the_start():
    with pytest.raises(
        ConfigError, match=r"reached in the ramp-up: 6.*decrease_batch_size_if_need"
    ):
        BatchSizeSchedule(target_batch_size=8, micro_batch_size=4, rampup_batch_size=[4, 2, 100])


def test_a_size_that_rounds_to_nothing_is_refused():
    with pytest.raises(ConfigError, match="reached in the ramp-up: 2"):
        BatchSizeSchedule(
            target_batch_size=8,
            micro_batch_size=4,
            rampup_batch_size=[2, 2, 100],
            decrease_batch_size_if_needed=True,
        )
