# SPDX-License-Identifier: Apache-2.0
"""The recorder keeps sinks away from training, and loses nothing but what it says."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent
from mb_logging import Recorder, read_events
from mb_logging.testing import MemorySink, sample_events


class Gate(MemorySink):
    """A sink that is stuck in its first record until it is opened."""

    def __init__(self):
        super().__init__()
        self.opened, self.entered = threading.Event(), threading.Event()

    def write(self, event):
        self.entered.set()
        assert self.opened.wait(20)
        super().write(event)


class Failing(MemorySink):
    """A sink that fails on the calls whose numbers, from 1, are given."""

    def __init__(self, *calls):
        super().__init__()
        self.calls, self.count = calls, 0

    def write(self, event):
        self.count += 1
        if self.count in self.calls:
            raise OSError(28, "No space left on device")
        super().write(event)


class Number:
    """What a 0-d tensor is to us."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return float(self.value)

    def __int__(self):
        return int(self.value)


def alive():
    return [t for t in threading.enumerate() if t.name == "mb-logging"]


def test_every_sink_gets_every_record_in_order_and_is_closed():
    sinks = MemorySink(), MemorySink()
    with Recorder(*sinks) as recorder:
        for event in sample_events():
            recorder.on_event(event)
    for sink in sinks:
        assert repr(sink.events) == repr(sample_events())
        assert sink.closed
    assert not alive()


def test_sinks_work_on_another_thread_than_training():
    threads = []

    class Sink(MemorySink):
        def write(self, event):
            threads.append(threading.current_thread())

    with Recorder(Sink()) as recorder:
        recorder.on_event(sample_events()[0])
    assert threads
    assert threading.current_thread() not in threads


def test_a_stuck_sink_does_not_hold_up_training(step_event):
    gate = Gate()
    recorder = Recorder(gate, capacity=100)
    begun = time.perf_counter()
    for step in range(1, 10_001):
        recorder.on_event(step_event(step))
    took = time.perf_counter() - begun
    assert not gate.events
    gate.opened.set()
    recorder.close()
    assert took < 5.0, "ten thousand records are microseconds each, not a sink's time"
    assert recorder.dropped + len(gate.events) == 10_000
    assert len(gate.events) in {100, 101}
    assert gate.events[-1].step == 10_000


def test_only_the_oldest_steps_give_way(step_event, caplog):
    gate = Gate()
    recorder = Recorder(gate, capacity=4)
    recorder.on_event(RunInfo(run_name="first"))
    assert gate.entered.wait(10)  # it is out of the queue, which holds four from here on
    kept = [
        EvalEvent(step=1, name="validation", loss=1.0, perplexity=2.7),
        SaveEvent(step=1, path="x", status="saved"),
        RunInfo(run_name="second"),
        RunEnd(step=9, reason="done"),
    ]
    for event in (step_event(1), step_event(2), kept[0], step_event(3), step_event(4), *kept[1:]):
        recorder.on_event(event)
    gate.opened.set()
    recorder.close()
    assert gate.events == [RunInfo(run_name="first"), *kept]
    assert recorder.dropped == 4
    assert "4 step records were dropped" in caplog.text


def test_a_queue_full_of_others_still_takes_no_more_than_one_step(step_event):
    gate = Gate()
    recorder = Recorder(gate, capacity=2)
    recorder.on_event(RunInfo(run_name="first"))
    assert gate.entered.wait(10)
    others = [EvalEvent(step=s, name="v", loss=1.0, perplexity=2.7) for s in range(5)]
    for event in (*others, step_event(1), step_event(2), step_event(3)):
        recorder.on_event(event)
    gate.opened.set()
    recorder.close()
    assert gate.events == [RunInfo(run_name="first"), *others, step_event(3)]


def test_a_failing_sink_is_reported_and_left_out_while_others_go_on(step_event, caplog):
    broken, sound = Failing(*range(1, 100)), MemorySink()
    with Recorder(broken, sound) as recorder:
        for step in range(1, 21):
            recorder.on_event(step_event(step))
    assert broken.count == 3
    assert broken.closed, "a sink that is left out still holds files"
    assert len(sound.events) == 20
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 2
    assert "Failing failed on a StepEvent" in errors[0]
    assert "left out from now on: OSError: [Errno 28] No space left on device" in errors[1]
    assert "Failing did not take 20 records of this run" in caplog.text


def test_a_sink_that_recovers_stays_and_is_reported_once(step_event, caplog):
    shaky = Failing(2, 3, 5, 6, 8)
    with Recorder(shaky) as recorder:
        for step in range(1, 11):
            recorder.on_event(step_event(step))
    assert [e.step for e in shaky.events] == [1, 4, 7, 9, 10]
    errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "did not take 5 records" in caplog.text


def test_a_sink_that_cannot_be_closed_harms_nobody(caplog):
    class Sink(MemorySink):
        def close(self):
            raise RuntimeError("stale file handle")

    after = MemorySink()
    with Recorder(Sink(), after):
        pass
    assert after.closed
    assert "Sink could not be closed" in caplog.text


def test_a_sink_that_wants_to_end_the_process_harms_nobody(step_event, caplog):
    class Exits(MemorySink):
        def write(self, event):
            sys.exit(3)

        def close(self):
            sys.exit(4)

    sound = MemorySink()
    with Recorder(Exits(), sound) as recorder:
        for step in range(1, 6):
            recorder.on_event(step_event(step))
        assert recorder.flush(10)
    assert [e.step for e in sound.events] == [1, 2, 3, 4, 5]
    assert sound.closed
    assert "left out from now on: SystemExit: 3" in caplog.text
    assert "Exits could not be closed" in caplog.text


def test_a_sink_may_close_its_recorder(step_event, caplog):
    class Closes(MemorySink):
        def write(self, event):
            super().write(event)
            recorder.close()

    sink = Closes()
    recorder = Recorder(sink)
    worker = alive()[-1]
    recorder.on_event(step_event(1))
    worker.join(10)
    assert sink.closed
    assert len(sink.events) == 1
    assert not caplog.text


def test_close_gives_up_on_a_stuck_sink_in_time(step_event, caplog):
    gate = Gate()
    recorder = Recorder(gate, flush_timeout_s=0.2)
    for step in range(1, 4):
        recorder.on_event(step_event(step))
    begun = time.perf_counter()
    recorder.close()
    assert time.perf_counter() - begun < 5.0
    assert "the sinks were not done after 0.2 s; 3 records may be lost" in caplog.text
    gate.opened.set()
    alive()[0].join(10)


def test_flush_waits_for_the_record_in_work(step_event):
    gate = Gate()
    with Recorder(gate) as recorder:
        recorder.on_event(step_event(1))
        assert gate.entered.wait(10)
        assert not recorder.flush(0.05)
        gate.opened.set()
        assert recorder.flush(10)
        assert [e.step for e in gate.events] == [1]


def test_closing_twice_and_records_after_it_do_nothing(step_event):
    sink = MemorySink()
    recorder = Recorder(sink)
    recorder.close()
    recorder.on_event(step_event(1))
    recorder.close()
    assert sink.events == []


def test_a_step_is_timed_from_the_last_and_its_rate_over_all(clock):
    sink = MemorySink()
    with Recorder(sink, flops_per_token=3e9, num_devices=2, clock=clock) as log:
        clock.now += 2.0
        log.step(1, loss=Number(2.5), tokens=Number(1000), samples=4, lr=1e-3, grad_norm=Number(3))
        clock.now += 8.0
        log.evaluation(1, loss=2.0, tokens=64, accuracy=Number(0.5))
        clock.now += 6.0
        log.step(2, loss=2.25, tokens=3000, samples=4, entropy=1.5)
    first, evaluation, second, end = sink.events
    assert first == StepEvent(
        step=1,
        consumed_samples=4,
        consumed_tokens=1000,
        loss=2.5,
        learning_rate=1e-3,
        grad_norm=3.0,
        global_batch_size=4,
        seconds=2.0,
        tokens_per_second=500.0,
        tflops_per_device=500.0 * 3e9 / 2 / 1e12,
    )
    assert evaluation == EvalEvent(
        step=1,
        name="validation",
        loss=2.0,
        perplexity=math.exp(2.0),
        num_tokens=64,
        seconds=8.0,
        metrics={"accuracy": 0.5},
    )
    assert (second.consumed_tokens, second.consumed_samples, second.seconds) == (4000, 8, 6.0)
    assert second.tokens_per_second == pytest.approx(4000 / 8.0)  # without the evaluation's 8 s
    assert second.metrics == {"entropy": 1.5}
    assert end == RunEnd(step=2, reason="the loop ended", seconds=16.0)


def test_a_loop_that_breaks_says_so_and_its_error_comes_through():
    sink = MemorySink()

    def train():
        with Recorder(sink) as log:
            log.step(1, loss=1.0)
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        train()
    assert (sink.events[-1].reason, sink.events[-1].exit_code) == ("ZeroDivisionError", 1)


def test_a_run_that_reports_its_own_end_gets_no_second_one(step_event):
    sink = MemorySink()
    with Recorder(sink) as log:
        log.step(1, loss=1.0)
        log.on_event(RunEnd(step=1, reason="train_iters=1 reached"))
    assert sum(isinstance(e, RunEnd) for e in sink.events) == 1
    engine = MemorySink()
    with Recorder(engine) as log:
        log.on_event(step_event(1))
    assert engine.events == [step_event(1)]


def test_a_process_that_forgets_to_close_loses_nothing(tmp_path):
    code = """
        from mb_logging import JSONL, Recorder
        log = Recorder(JSONL("metrics.jsonl"))
        for step in range(1, 501):
            log.step(step, loss=1.0 / step)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True)
    steps = [e.step for e in read_events(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 501))


def test_no_room_at_all_is_refused():
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        Recorder(capacity=0)
    assert not alive()
