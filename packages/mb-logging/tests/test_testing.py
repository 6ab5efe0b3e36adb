# SPDX-License-Identifier: Apache-2.0
"""The kit for sinks catches what would break a run."""

from __future__ import annotations

import threading

import pytest
from mb_logging.testing import MemorySink, check_sink


def test_a_sink_that_remembers_passes():
    check_sink(MemorySink)


def test_what_lacks_a_method_is_no_sink():
    class NoClose:
        def write(self, event):
            pass

    with pytest.raises(AssertionError, match="NoClose lacks write"):
        check_sink(NoClose)


def test_a_sink_bound_to_its_thread_is_caught():
    class Bound(MemorySink):
        def __init__(self):
            super().__init__()
            self.thread = threading.get_ident()

        def write(self, event):
            if threading.get_ident() != self.thread:
                raise RuntimeError("made on another thread")

    with pytest.raises(RuntimeError, match="made on another thread"):
        check_sink(Bound)


def test_a_sink_that_needs_a_run_before_steps_is_caught():
    class NeedsRun(MemorySink):
        def write(self, event):
            self.total = getattr(event, "total_steps", None) or self.total

    with pytest.raises(AttributeError, match="total"):
        check_sink(NeedsRun)


def test_a_sink_that_changes_records_is_caught():
    class Changes(MemorySink):
        def write(self, event):
            getattr(event, "metrics", {}).clear()

    with pytest.raises(AssertionError, match="changed a record"):
        check_sink(Changes)
