# SPDX-License-Identifier: Apache-2.0
"""Pictures, and the curves they are drawn from."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
from mb_config.records import EvalEvent, RunInfo
from mb_logging import JSONL, LoggingError, Plot, plot_events, plot_metrics
from mb_logging.curves import Curves
from mb_logging.plots import curves_of, smoothed
from mb_logging.testing import check_sink, sample_events

matplotlib = pytest.importorskip("matplotlib")


def evaluation(step, loss, name="validation"):
    return EvalEvent(step=step, name=name, loss=loss, perplexity=math.exp(loss))


def size_of_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def pixels(path, color):
    """Return how many pixels have exactly this colour, RGB in 0..255."""
    from matplotlib.image import imread

    image = (imread(path)[..., :3] * 255).round().astype(int)
    return int((image == color).all(axis=-1).sum())


BLUE, RED, GREY = (0x44, 0x77, 0xAA), (0xCC, 0x33, 0x11), (0x77, 0x77, 0x77)


def test_it_is_a_sink(tmp_path):
    check_sink(lambda: Plot(tmp_path / "loss.png"))


def test_training_validation_and_learning_rate_are_drawn(tmp_path, step_event):
    events = [step_event(s, loss=5.0 / s) for s in range(1, 30)]
    plot_events([*events, evaluation(10, 2.0), evaluation(20, 1.0)], tmp_path / "loss.png")
    assert size_of_png(tmp_path / "loss.png") == (1120, 728)
    assert all(pixels(tmp_path / "loss.png", color) > 100 for color in (BLUE, RED, GREY))
    plot_events(events, tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png", RED) == 0


def test_a_long_run_is_drawn_smoothed_and_its_broken_losses_marked(tmp_path, step_event):
    events = [step_event(s, loss=math.nan if s == 50 else 2.0) for s in range(1, 100)]
    plot_events(events, tmp_path / "loss.png", title="long")
    assert pixels(tmp_path / "loss.png", RED) > 5


def test_a_run_of_nan_alone_is_still_a_picture(tmp_path, step_event):
    plot_events([step_event(s, loss=math.nan) for s in (1, 2)], tmp_path / "loss.png")
    size_of_png(tmp_path / "loss.png")


def test_the_sink_draws_at_an_evaluation_and_at_the_end(tmp_path, step_event):
    picture = tmp_path / "plots" / "loss.png"
    sink = Plot(picture)
    sink.write(step_event(1))
    assert not picture.exists()
    sink.write(evaluation(1, 2.0))
    first = picture.read_bytes()
    sink.write(step_event(2))
    assert picture.read_bytes() == first
    sink.close()
    assert picture.read_bytes() != first
    assert [p.name for p in picture.parent.iterdir()] == ["loss.png"]


def test_a_run_without_steps_leaves_no_picture(tmp_path):
    sink = Plot(tmp_path / "loss.png")
    sink.write(sample_events()[0])
    sink.close()
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_is_drawn_with_what_came_before(tmp_path, step_event):
    earlier = JSONL(tmp_path / "metrics.jsonl")
    for event in (RunInfo(run_name="r"), step_event(1), step_event(2), evaluation(2, 3.0)):
        earlier.write(event)
    earlier.close()
    sink = Plot(tmp_path / "loss.png", history=tmp_path / "metrics.jsonl")
    for event in (RunInfo(run_name="r", start_step=2), step_event(3)):
        sink.write(event)
    sink.close()
    everything = [step_event(1), step_event(2), evaluation(2, 3.0), step_event(3)]
    plot_events(everything, tmp_path / "whole.png", title="r")
    assert (tmp_path / "loss.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_history_that_is_not_there_yet_is_no_error(tmp_path):
    Plot(tmp_path / "loss.png", history=tmp_path / "metrics.jsonl").close()


def test_a_metrics_file_is_drawn_alone(tmp_path):
    sink = JSONL(tmp_path / "metrics.jsonl")
    for event in sample_events():
        sink.write(event)
    sink.close()
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "loss.svg")
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, step_event):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(LoggingError, match=r"metrics\.jsonl: no step to draw; give a file"):
        plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with pytest.raises(LoggingError, match=r"no\.jsonl: cannot be read"):
        plot_metrics(tmp_path / "no.jsonl", tmp_path / "loss.png")
    with pytest.raises(LoggingError, match="no step to draw: the run has reported none"):
        plot_events(sample_events()[:1], tmp_path / "loss.png")
    with pytest.raises(LoggingError, match=r"loss\.mp3: no picture can be of type 'mp3'; .*png"):
        plot_events([step_event(1)], tmp_path / "loss.mp3")


def test_a_failed_drawing_leaves_the_earlier_picture(tmp_path, step_event, monkeypatch):
    plot_events([step_event(1)], tmp_path / "loss.png")
    before = (tmp_path / "loss.png").read_bytes()

    def half(self, file, **options):
        Path(file).write_bytes(b"\x89PNG half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plot_events([step_event(1), step_event(2)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize("span", [2.0, 5.0, 31.0])
def test_smoothing_equals_its_formula(span):
    values = [math.sin(0.3 * i) + (i % 7) for i in range(60)]
    values[0] = values[20] = math.nan
    values[33] = math.inf
    a = 1.0 - 2.0 / (span + 1.0)
    finite = [(j, v) for j, v in enumerate(values) if math.isfinite(v)]
    expected = [
        sum(a ** abs(i - j) * v for j, v in finite) / sum(a ** abs(i - j) for j, _ in finite)
        for i in range(len(values))
    ]
    assert smoothed(values, span) == pytest.approx(expected, rel=1e-12)


def test_smoothing_nothing_is_nothing():
    assert smoothed([], 5.0) == []
    assert all(math.isnan(v) for v in smoothed([math.nan, math.inf], 5.0))


class TestCurves:
    def test_a_resumed_run_replaces_what_it_does_again(self, step_event):
        curves = curves_of(
            [
                RunInfo(run_name="r"),
                *(step_event(s, loss=9.0) for s in range(1, 7)),
                evaluation(3, 9.0),
                evaluation(6, 9.0),
                evaluation(6, 8.0, name="only later"),
                RunInfo(run_name="r", start_step=4),
                step_event(5, loss=1.0),
            ]
        )
        assert [p.loss for p in curves.train.values()] == [9.0, 9.0, 9.0, 9.0, 1.0]
        assert list(curves.train) == [1, 2, 3, 4, 5]
        assert curves.validation == {"validation": {3: 9.0}}

    def test_a_loop_that_counts_back_replaces_what_it_does_again(self, step_event):
        curves = curves_of(
            [step_event(s, loss=9.0) for s in (0, 10, 20, 30)] + [step_event(10, loss=1.0)]
        )
        assert {s: p.loss for s, p in curves.train.items()} == {0: 9.0, 10: 1.0}

    def test_a_new_run_in_an_old_file_begins_anew(self, step_event):
        curves = curves_of([step_event(1), evaluation(1, 2.0), RunInfo(run_name="new")])
        assert curves == Curves()
