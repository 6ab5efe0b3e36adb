# SPDX-License-Identifier: Apache-2.0
"""Learning-rate and weight-decay curves against megatron-core's scheduler."""

from __future__ import annotations

import json
import math
import warnings
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from mb_config import ConfigContainer
from mb_config.errors import ConfigError
from mb_engine.runtime.megatron_compat import prepare_megatron
from mb_engine.runtime.megatron_cpu import install
from mb_engine.train.schedule import LR_STYLES, ParamScheduler, Schedule, build_scheduler


def _from_megatron() -> type:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core and torch.jit warn when imported
        install()
        prepare_megatron()
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    return OptimizerParamScheduler


OptimizerParamScheduler = _from_megatron()

# megatron-core's scheduler logs by rank, and there is none here
pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")
WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
GROUPS = (
    {},
    {"wd_mult": 0.0},
    {"max_lr": 2e-2, "min_lr": 5e-4},
)
RAMPED = {"start_wd": 0.02, "end_wd": 0.3, "wd_mult": 0.5}


def optimizer(*groups: dict) -> SimpleNamespace:
    return SimpleNamespace(param_groups=[dict(g) for g in (groups or GROUPS)])


def megatron(schedule: Schedule, *groups: dict, **kwargs: bool) -> object:
    return OptimizerParamScheduler(
        optimizer(*groups),
        init_lr=schedule.lr_warmup_init,
        max_lr=schedule.max_lr,
        min_lr=schedule.min_lr,
        lr_warmup_steps=schedule.lr_warmup_steps,
        lr_decay_steps=schedule.lr_decay_steps,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=schedule.start_wd,
        end_wd=schedule.end_wd,
        wd_incr_steps=schedule.wd_incr_steps,
        wd_incr_style=schedule.wd_incr_style,
        wsd_decay_steps=schedule.wsd_decay_steps,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
        **{"use_checkpoint_opt_param_scheduler": False, **kwargs},
    )


def assert_same_groups(ours: ParamScheduler, theirs: object) -> None:
    for mine, other in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert mine["lr"] == pytest.approx(other["lr"], rel=0, abs=1e-9)
        assert mine["weight_decay"] == pytest.approx(other["weight_decay"], rel=0, abs=1e-9)


@pytest.mark.parametrize("wd_style", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 40])
@pytest.mark.parametrize(
    ("style", "wsd"), [*product(LR_STYLES[:-1], ["linear"]), *product(["WSD"], WSD_STYLES)]
)
def test_every_style_equals_megatron_at_every_sample(style, wsd, warmup, wd_style):
    schedule = Schedule(
        max_lr=3e-3,
        min_lr=3e-4,
        lr_warmup_init=1e-5,
        lr_warmup_steps=warmup,
        lr_decay_steps=200,
        lr_decay_style=style,
        wsd_decay_steps=70,
        lr_wsd_decay_style=wsd,
        start_wd=0.01,
        end_wd=0.1,
        wd_incr_steps=150,
        wd_incr_style=wd_style,
    )
    groups = (*GROUPS, RAMPED)
    ours = ParamScheduler(optimizer=optimizer(*groups), schedule=schedule)
    theirs = megatron(schedule, *groups)
    for _ in range(220):
        assert_same_groups(ours, theirs)
        ours.step(1)
        theirs.step(1)
    assert_same_groups(ours, theirs)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    decay = draw(st.integers(1, 10**7))
    low = draw(st.floats(0, 1e-2))
    high = low + draw(st.floats(0, 1e-1))
    wd_style = draw(st.sampled_from(["constant", "linear", "cosine"]))
    start_wd = draw(st.floats(0, 1))
    return Schedule(
        max_lr=high,
        min_lr=low,
        lr_warmup_init=high * draw(st.floats(0, 1)),
        lr_warmup_steps=draw(st.integers(0, decay - 1)),
        lr_decay_steps=decay,
        lr_decay_style=draw(st.sampled_from(LR_STYLES)),
        wsd_decay_steps=draw(st.integers(1, decay)),
        lr_wsd_decay_style=draw(st.sampled_from(WSD_STYLES)),
        start_wd=start_wd,
        end_wd=start_wd if wd_style == "constant" else start_wd + draw(st.floats(0, 1)),
        wd_incr_steps=draw(st.integers(1, 10**7)),
        wd_incr_style=wd_style,
    )


@settings(max_examples=200)
@given(schedules(), st.integers(0, 2 * 10**7), st.data())
def test_any_schedule_equals_megatron_at_any_sample(schedule, samples, data):
    c = schedule
    bends = [
        0,
        c.lr_warmup_steps,
        c.lr_decay_steps,
        c.lr_decay_steps - c.wsd_decay_steps,
        c.wd_incr_steps,
    ]
    at = data.draw(st.sampled_from([samples, *(max(0, b + d) for b in bends for d in (-1, 0, 1))]))
    theirs = megatron(schedule, {})
    theirs.step(at)
    assert schedule.learning_rate(at) == pytest.approx(theirs.get_lr({}), rel=0, abs=1e-9)
    assert schedule.weight_decay(at) == pytest.approx(theirs.get_wd({}), rel=0, abs=1e-9)


def test_cosine_and_linear_pass_through_their_closed_form_midpoint():
    for style in ("cosine", "linear"):
        schedule = Schedule(
            max_lr=1.0, min_lr=0.2, lr_warmup_steps=100, lr_decay_steps=300, lr_decay_style=style
        )
        assert schedule.learning_rate(50) == pytest.approx(0.5)
        assert schedule.learning_rate(200) == pytest.approx(0.6)
        assert schedule.learning_rate(300) == pytest.approx(0.2)
        assert schedule.learning_rate(10**9) == 0.2


def test_wsd_without_a_tail_length_decays_all_the_way():
    schedule = Schedule(
        max_lr=1.0, lr_decay_steps=100, lr_decay_style="WSD", lr_wsd_decay_style="minus_sqrt"
    )
    assert schedule.learning_rate(25) == pytest.approx(1 - math.sqrt(0.25))


def test_a_weight_decay_ramp_of_no_length_is_its_end():
    schedule = Schedule(
        max_lr=1.0, start_wd=0.1, end_wd=0.3, wd_incr_style="linear", wd_incr_steps=0
    )
    assert schedule.weight_decay(0) == 0.3


def test_lr_mult_scales_the_learning_rate_of_its_group():
    schedule = Schedule(max_lr=1.0, lr_decay_steps=10, lr_decay_style="constant")
    scheduler = ParamScheduler(optimizer=optimizer({}, {"lr_mult": 0.25}), schedule=schedule)
    assert [g["lr"] for g in scheduler.optimizer.param_groups] == [1.0, 0.25]


def test_a_learning_rate_that_is_a_tensor_is_written_in_place():
    held = torch.tensor(0.0, dtype=torch.float64)
    scheduler = ParamScheduler(
        optimizer=optimizer({"lr": held}),
        schedule=Schedule(max_lr=1.0, lr_decay_steps=10, lr_decay_style="linear"),
    )
    scheduler.step(4)
    assert scheduler.optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.6)


BASE = Schedule(
    max_lr=1e-3,
    min_lr=1e-4,
    lr_warmup_steps=10,
    lr_decay_steps=100,
    lr_decay_style="cosine",
    start_wd=0.1,
    end_wd=0.1,
    wd_incr_steps=100,
)


def state_at(schedule: Schedule, samples: int) -> dict:
    scheduler = ParamScheduler(optimizer=optimizer(), schedule=schedule)
    scheduler.step(samples)
    return json.loads(json.dumps(scheduler.state_dict()))


def test_state_is_plain_data_and_goes_on_where_it_stopped():
    resumed = ParamScheduler(optimizer=optimizer(), schedule=BASE)
    resumed.load_state_dict(state_at(BASE, 37))
    straight = ParamScheduler(optimizer=optimizer(), schedule=BASE)
    straight.step(37)
    assert resumed.num_steps == 37
    assert resumed.optimizer.param_groups == straight.optimizer.param_groups
    resumed.step(5)
    straight.step(5)
    assert resumed.optimizer.param_groups == straight.optimizer.param_groups


def test_reads_a_state_that_megatron_wrote():
    theirs = megatron(BASE)
    theirs.step(50)
    ours = ParamScheduler(optimizer=optimizer(), schedule=BASE)
    ours.load_state_dict(theirs.state_dict())
    assert_same_groups(ours, theirs)


def test_a_load_into_a_used_scheduler_sets_the_position_rather_than_adding():
    scheduler = ParamScheduler(optimizer=optimizer(), schedule=BASE)
    scheduler.step(80)
    scheduler.load_state_dict(state_at(BASE, 37))
    assert scheduler.num_steps == 37


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"max_lr": 2e-3}, "optimizer.lr=0.001: differs from 0.002"),
        ({"min_lr": 0.0}, "optimizer.min_lr=0.0001: differs from 0.0"),
        ({"lr_warmup_steps": 20}, "scheduler.lr_warmup_steps=10: differs from 20"),
        ({"lr_decay_steps": 300}, "scheduler.lr_decay_steps=100: differs from 300"),
        ({"lr_decay_style": "linear"}, "scheduler.lr_decay_style=cosine: differs from linear"),
        ({"end_wd": 0.2, "start_wd": 0.2}, "scheduler.start_weight_decay=0.1: differs from 0.2"),
    ],
)
def test_by_default_a_different_checkpoint_is_refused_by_field(change, name):
    scheduler = ParamScheduler(optimizer=optimizer(), schedule=BASE)
    with pytest.raises(ConfigError, match=name) as caught:
        scheduler.load_state_dict(state_at(evolve(BASE, **change), 37))
    assert "override_opt_param_scheduler=true" in str(caught.value)
    assert scheduler.num_steps == 0
    assert scheduler.schedule == BASE


def test_a_field_without_effect_may_differ():
    constant = evolve(BASE, lr_decay_style="constant")
    longer = evolve(constant, lr_decay_steps=500, wd_incr_steps=900, min_lr=0.0)
    scheduler = ParamScheduler(optimizer=optimizer(), schedule=longer)
    scheduler.load_state_dict(state_at(constant, 37))
    assert scheduler.num_steps == 37


def test_override_keeps_the_configuration_and_the_position():
    scheduler = ParamScheduler(
        optimizer=optimizer(),
        schedule=BASE,
        override_opt_param_scheduler=True,
    )
    scheduler.load_state_dict(state_at(evolve(BASE, max_lr=0.5, lr_decay_steps=700), 37))
    assert scheduler.schedule == BASE
    assert scheduler.optimizer.param_groups[0]["lr"] == BASE.learning_rate(37)


def test_use_checkpoint_takes_the_schedule_of_the_checkpoint_into_every_group():
    saved = evolve(BASE, max_lr=0.5, lr_decay_steps=700)
    # megatron-core writes the configured max_lr into each group; that is not an override
    scheduler = ParamScheduler(
        optimizer=optimizer({"max_lr": BASE.max_lr}, {"max_lr": 0.25}),
        schedule=BASE,
        use_checkpoint_opt_param_scheduler=True,
    )
    scheduler.load_state_dict(state_at(saved, 37))
    assert scheduler.schedule == saved
    rates = [g["lr"] for g in scheduler.optimizer.param_groups]
    assert rates == [saved.learning_rate(37), evolve(saved, max_lr=0.25).learning_rate(37)]


def test_both_policies_at_once_are_refused():
    with pytest.raises(ConfigError, match="use_checkpoint_opt_param_scheduler=True"):
        ParamScheduler(
            optimizer=optimizer(),
            schedule=BASE,
            override_opt_param_scheduler=True,
            use_checkpoint_opt_param_scheduler=True,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_lr": 0.1}, "optimizer.lr=0.001: must be >= min_lr=0.1"),
        ({"lr_warmup_init": 0.1}, "scheduler.lr_warmup_init=0.1: must be <= lr=0.001"),
        ({"lr_warmup_steps": 100}, "scheduler.lr_warmup_steps=100: must be < lr_decay_steps=100"),
        ({"start_wd": 0.2}, "scheduler.end_weight_decay=0.1: must be >= start_wd=0.2"),
        ({"end_wd": 0.2}, "scheduler.end_weight_decay=0.2: must equal start_wd=0.1"),
    ],
)
def test_contradicting_values_are_refused_by_field(change, message):
    with pytest.raises(ConfigError, match=message):
        evolve(BASE, **change)


def test_a_resolved_config_becomes_its_schedule():
    config = ConfigContainer()
    config.optimizer.lr, config.optimizer.min_lr, config.optimizer.weight_decay = 1e-3, 1e-4, 0.1
    config.scheduler.lr_decay_style = "cosine"
    config.scheduler.lr_warmup_steps = 10
    config.scheduler.lr_decay_steps = config.scheduler.wd_incr_steps = 100
    config.scheduler.override_opt_param_scheduler = True
    scheduler = build_scheduler(config, optimizer())
    assert scheduler.schedule == BASE
    assert scheduler.override_opt_param_scheduler
    assert scheduler.lr == 0.0
    assert scheduler.weight_decay == 0.1
