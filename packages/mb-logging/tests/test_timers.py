# SPDX-License-Identifier: Apache-2.0
"""Spans add up, nest, and ask for no time before they are read."""

from __future__ import annotations

import time

import pytest
from mb_logging import Span, Timers, as_metrics, over_ranks


class DeviceClock:
    """Marks whose times are known only when they are read, as CUDA events are."""

    def __init__(self):
        self.now = 0.0
        self.read = 0

    def mark(self):
        return [self.now]

    def seconds(self, begin, end):
        self.read += 1
        return end[0] - begin[0]


@pytest.fixture
def device():
    return DeviceClock()


def test_spans_nest_and_add_up(device):
    timers = Timers(clock=device)
    for forward, backward in ((1.0, 2.0), (3.0, 5.0)):
        with timers.span("step"):
            with timers.span("forward"):
                device.now += forward
            with timers.span("backward"):
                device.now += backward
    spans = timers.take()
    assert spans == {
        "step/forward": Span(count=2, total=4.0, least=1.0, most=3.0),
        "step/backward": Span(count=2, total=7.0, least=2.0, most=5.0),
        "step": Span(count=2, total=11.0, least=3.0, most=8.0),
    }
    assert spans["step"].mean == 5.5
    assert as_metrics(spans)["time/step/forward"] == 2.0


def test_nothing_waits_for_the_device_before_it_is_asked(device):
    timers = Timers(clock=device)
    for _ in range(100):
        with timers.span("step"):
            pass
    assert device.read == 0
    timers.take()
    assert device.read == 100


def test_marks_do_not_pile_up_for_ever(device):
    timers = Timers(clock=device)
    for _ in range(25_000):
        with timers.span("step"):
            device.now += 1.0
    assert device.read == 20_000
    assert timers.take()["step"].total == 25_000.0


def test_taking_begins_anew_and_may_happen_inside_a_span(device):
    timers = Timers(clock=device)
    with timers.span("outer"):
        with timers.span("inner"):
            device.now += 1.0
        assert list(timers.take()) == ["outer/inner"]
    assert timers.take() == {"outer": Span(count=1, total=1.0, least=1.0, most=1.0)}
    assert timers.take() == {}


def test_a_span_that_breaks_counts_and_is_left(device):
    timers = Timers(clock=device)

    def work():
        with timers.span("a"):
            device.now += 2.0
            raise KeyError

    with pytest.raises(KeyError):
        work()
    with timers.span("b"):
        pass
    assert list(timers.take()) == ["a", "b"]


def test_the_host_clock_is_the_default():
    timers = Timers()
    with timers.span("sleep"):
        time.sleep(0.02)
    assert 0.02 <= timers.take()["sleep"].total < 2.0


def test_ranks_are_compared_where_they_have_a_span():
    def spans(**totals):
        return {name: Span(count=1, total=total) for name, total in totals.items()}

    result = over_ranks([spans(step=2.0, embed=1.0), spans(step=5.0), spans(step=3.0, head=4.0)])
    assert list(result) == ["step", "embed", "head"]
    assert (result["step"].least, result["step"].most, result["step"].slowest_rank) == (2.0, 5.0, 1)
    assert (result["head"].least, result["head"].slowest_rank) == (4.0, 2)
    assert over_ranks([]) == {}
    assert Span().mean == 0.0
