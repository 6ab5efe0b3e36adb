# SPDX-License-Identifier: Apache-2.0
"""Steps, samples and schedule lengths, against simulations step by step."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mb_config.ramp import Ramp


def batch_by_definition(consumed, *, target, start, increment, samples, multiple):
    """Megatron's ramp-up with exact fractions instead of floats."""
    size = target
    if samples and consumed < samples:
        per_stage = Fraction(samples, (target - start) // increment)
        size = start + int(Fraction(consumed) / per_stage) * increment
    return size // multiple * multiple


@st.composite
def ramps(draw):
    start, increment = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    target = start + increment * draw(st.integers(1, 6))
    samples, multiple = draw(st.integers(1, 300)), draw(st.integers(1, start))
    return {
        "target": target, "start": start, "increment": increment, "samples": samples,
        "multiple": multiple,
    }  # fmt: skip


class TestRamp:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(ramps(), st.integers(0, 120))
    def test_samples_and_steps_equal_a_simulation(self, kind, steps):
        ramp, consumed = Ramp(**kind), 0
        for _ in range(steps):
            size = batch_by_definition(consumed, **kind)
            assert ramp.batch_at(consumed) == size
            consumed += size
        assert ramp.samples_after(steps) == consumed
        assert ramp.steps_within(consumed) == steps
        assert ramp.steps_within(consumed + batch_by_definition(consumed, **kind) - 1) == steps

    def test_without_ramp_up_it_is_a_product(self):
        assert Ramp(target=16).samples_after(10) == 160
        assert Ramp(target=16).steps_within(175) == 10
        assert Ramp(target=18, multiple=4).samples_after(10) == 160


class TestLengths:
    """World size 1, batch 16, 100 steps unless said otherwise."""

    def lengths(self, small, *overrides):
        made = small.override(*overrides).finalize(1).scheduler
        return made.lr_decay_steps, made.lr_warmup_steps, made.wd_incr_steps, made.wsd_decay_steps

    def test_everything_is_in_samples(self, small):
        assert self.lengths(small, "scheduler.lr_warmup_iters=10") == (1600, 160, 1600, None)

    def test_a_decay_of_its_own(self, small):
        assert self.lengths(small, "scheduler.lr_decay_iters=200") == (3200, 0, 1600, None)

    def test_a_fraction_is_of_the_decay(self, small):
        got = self.lengths(small, "scheduler.lr_decay_iters=50", "scheduler.lr_warmup_fraction=0.1")
        assert got == (800, 80, 1600, None)

    def test_the_tail_of_wsd(self, small):
        wsd = "scheduler.lr_decay_style=WSD"
        assert self.lengths(small, wsd, "scheduler.lr_wsd_decay_iters=20") == (1600, 0, 1600, 320)
        assert self.lengths(small, wsd, "scheduler.lr_wsd_decay_samples=33")[3] == 33

    def test_training_by_samples(self, small):
        by = ("train.train_iters=null", "train.train_samples=1000")
        assert self.lengths(small, *by) == (1000, 0, 1000, None)
        assert self.lengths(small, *by, "scheduler.lr_warmup_samples=64")[1] == 64
        assert self.lengths(small, *by, "scheduler.lr_warmup_iters=4")[1] == 64
        assert small.override(*by).finalize(1).train.train_iters == 62

    def test_training_by_tokens(self, small):
        by = ("train.train_iters=null", "train.train_tokens=32000")
        assert self.lengths(small, *by) == (1000, 0, 1000, None)

    def test_ramp_up_counts_the_samples_that_are_really_consumed(self, small):
        kind = {"target": 16, "start": 4, "increment": 4, "samples": 120, "multiple": 1}
        consumed, after = 0, [0]
        for _ in range(100):
            consumed += batch_by_definition(consumed, **kind)
            after.append(consumed)
        ramp = "train.rampup_batch_size=[4, 4, 120]"
        got = self.lengths(small, ramp, "scheduler.lr_warmup_iters=10")
        assert got == (after[100], after[10], after[100], None)
        assert after[100] < 1600
        tail = self.lengths(
            small, ramp, "scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=95"
        )
        assert tail[3] == after[100] - after[5]

    @pytest.mark.parametrize(
        ("given", "samples"), [("train_samples=500", 500), ("train_tokens=16000", 500)]
    )
    def test_ramp_up_works_with_samples_and_tokens(self, small, given, samples):
        kind = {"target": 16, "start": 4, "increment": 4, "samples": 120, "multiple": 1}
        consumed = steps = 0
        while consumed + batch_by_definition(consumed, **kind) <= samples:
            consumed += batch_by_definition(consumed, **kind)
            steps += 1
        resolved = small.override(
            "train.train_iters=null", f"train.{given}", "train.rampup_batch_size=[4, 4, 120]"
        ).finalize(1)
        assert resolved.train.train_iters == steps
        assert resolved.scheduler.lr_decay_steps == samples

    def test_weight_decay_is_the_optimizers_unless_it_grows(self, small):
        made = small.override("optimizer.weight_decay=0.1").finalize(1).scheduler
        assert (made.start_weight_decay, made.end_weight_decay) == (0.1, 0.1)
        made = small.override(
            "scheduler.weight_decay_incr_style=cosine", "scheduler.end_weight_decay=0.2"
        ).finalize(1).scheduler  # fmt: skip
        assert (made.start_weight_decay, made.end_weight_decay) == (0.01, 0.2)
