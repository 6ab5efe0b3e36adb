# SPDX-License-Identifier: Apache-2.0
"""Records and clocks for the tests."""

from __future__ import annotations

import pytest
from mb_config.records import StepEvent


@pytest.fixture
def step_event():
    """Return a maker of step records."""

    def make(step, **fields):
        defaults = {
            "consumed_samples": 8 * step,
            "consumed_tokens": 256 * step,
            "loss": 5.5 - 0.01 * step,
            "learning_rate": 1e-3,
        }
        return StepEvent(step=step, **(defaults | fields))

    return make


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """Return a clock that a test moves."""
    return FakeClock()
