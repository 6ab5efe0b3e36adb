# SPDX-License-Identifier: Apache-2.0
"""What a person sees, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import textwrap

import pytest
from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent
from mb_logging import Console
from mb_logging.progress import Progress
from mb_logging.sinks.displays import TextBar
from mb_logging.testing import check_sink, sample_events


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Ascii(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii")

    def text(self):
        return self.buffer.getvalue().decode("ascii")


@pytest.fixture
def lines(clock):
    """Return a console that writes to a file, and a function for what it wrote."""
    stream = io.StringIO()

    def written():
        return stream.getvalue().splitlines()

    def make(total=None, **options):
        return Console(total, stream=stream, clock=clock, **options), written

    return make


class TestLines:
    def test_it_is_a_sink(self):
        check_sink(lambda: Console(stream=io.StringIO()))

    def test_a_report_says_what_is_known_and_nothing_else(self, lines, step_event, clock):
        console, written = lines(1000)
        console.write(RunInfo(run_name="r", device="NVIDIA A100-SXM4-80GB"))
        clock.now += 60.0  # the first report after a slow start must not spoil the estimate
        console.write(step_event(10, loss=2.34567, grad_norm=1.2344, seconds=0.5))
        clock.now += 10.0
        console.write(
            step_event(
                20, tokens_per_second=81234.4, tflops_per_device=156.0, metrics={"z_loss": 0.125}
            )
        )
        console.close()
        assert written()[1] == (
            "step     10/1000  loss   2.3457  lr 1.00e-03  grad norm    1.234  ETA    8:15"
        )
        assert written()[2] == (
            "step     20/1000  loss   5.3000  lr 1.00e-03     81,234 tokens/s  156.0 TFLOP/s"
            "  MFU 50.0%  ETA   16:20  z_loss 0.125"
        )

    def test_columns_stand_under_each_other(self, lines, step_event):
        console, written = lines(10_000, interval_s=0.0)
        for step, loss, rate in ((1, 11.0, 900.0), (99, 2.5, 1e6), (10_000, 0.0123, 12345.0)):
            console.write(
                step_event(step, loss=loss, grad_norm=loss, tokens_per_second=rate, seconds=1.0)
            )
        console.close()
        for word in ("loss", "lr", "grad norm", "tokens/s", "ETA"):
            assert len({line.index(word) for line in written()}) == 1, word

    def test_lines_come_an_interval_apart_but_the_first_and_last_always(
        self, lines, step_event, clock
    ):
        console, written = lines(100, interval_s=1.0)
        for step in range(1, 101):
            clock.now += 0.15
            console.write(step_event(step))
        shown = [int(re.search(r"(\d+)/100", line)[1]) for line in written()]
        assert (shown[0], shown[-1]) == (1, 100)
        assert shown[1:4] == [8, 15, 22]

    def test_the_step_before_an_evaluation_is_shown(self, lines, step_event):
        console, written = lines(interval_s=60.0)
        for step in range(1, 6):
            console.write(step_event(step))
        console.write(EvalEvent(step=5, name="books", loss=2.0, perplexity=7.389, seconds=1.25))
        console.write(step_event(6))
        console.close()
        assert [line[:12].strip() for line in written()] == [
            "step      1", "step      5", "step      5", "step      6",
        ]  # fmt: skip
        assert written()[2] == "step      5  books: loss 2.0000  perplexity 7.39  (1.2 s)"

    def test_a_run_begins_and_ends_with_a_line(self, lines):
        console, written = lines()
        console.write(
            RunInfo(
                run_name="quickstart",
                num_parameters=2_490_000,
                world_size=2,
                device="CPU (x86_64)",
                layout="TP2",
                sequence_length=256,
                start_step=180,
                total_steps=200,
            )
        )
        console.write(RunEnd(step=190, reason="SIGTERM", seconds=3725.0, exit_code=1))
        console.close()
        assert " | ".join(written()) == (
            "quickstart: 2.49 M parameters, 2 x CPU (x86_64), TP2, sequence 256, from step 180,"
            " to step 200 | ended after step 190: SIGTERM (1:02:05, exit code 1)"
        )

    def test_checkpoints_are_shown_when_durable_or_failed(self, lines):
        console, written = lines()
        for status, error in (("started", ""), ("saved", ""), ("failed", "disk full")):
            console.write(SaveEvent(step=7, path="run/7", status=status, seconds=0.5, error=error))
        assert written() == [
            "step      7  checkpoint in run/7 (0.5 s)",
            "step      7  CHECKPOINT FAILED: disk full",
        ]

    def test_what_a_stream_cannot_encode_becomes_a_question_mark(self):
        stream = Ascii()
        console = Console(stream=stream)
        console.write(RunInfo(run_name="zürich", device="cpu"))
        console.close()
        assert stream.text() == "z?rich: cpu, 1 rank\n"

    def test_standard_output_is_the_default(self, capsys):
        console = Console()
        console.write(RunEnd(step=3, reason="done"))
        console.close()
        assert capsys.readouterr().out == "ended after step 3: done (0:00)\n"

    def test_a_dumb_terminal_gets_lines(self, monkeypatch, step_event):
        monkeypatch.setenv("TERM", "dumb")
        stream = Terminal()
        console = Console(10, stream=stream)
        console.write(step_event(1))
        console.close()
        assert re.fullmatch(r"step +1/10 [^\r\x1b]*\n", stream.getvalue())


class TestTextBar:
    @pytest.fixture
    def stream(self, monkeypatch):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setattr("mb_logging.sinks.console.find_spec", lambda _: None)
        return Terminal()

    def test_it_is_a_sink(self, stream):
        check_sink(lambda: Console(stream=stream))

    def test_it_is_drawn_over_itself_and_fits_the_terminal(self, stream, step_event):
        console = Console(4, stream=stream)
        for step in (1, 2, 3):
            console.write(step_event(step, grad_norm=1.0, tokens_per_second=1e5, seconds=60.0))
        console.close()
        drawn = stream.getvalue().removesuffix("\n").split("\r")[1:]
        assert len(drawn) == 3
        assert drawn[0].startswith("[#####...............] 1/4  ETA 3:00  loss")
        assert drawn[1].startswith("[##########..........] 2/4")
        assert all(len(text) <= 59 for text in drawn)

    def test_a_line_takes_the_place_of_the_bar(self, stream, step_event):
        console = Console(4, stream=stream)
        console.write(step_event(1))
        console.write(EvalEvent(step=1, name="v", loss=1.0, perplexity=2.72))
        console.close()
        bar, blank, line = stream.getvalue().split("\r")[1:]
        assert blank == " " * len(bar)
        assert line == "step      1  v: loss 1.0000  perplexity 2.72  (0.0 s)\n"

    def test_a_run_without_an_end_shows_its_step(self, step_event, stream):
        progress = Progress()
        progress.add(step_event(12))
        TextBar(stream, progress).step(step_event(12), device="")
        assert stream.getvalue().startswith("\rstep 12  loss")


class TestRich:
    def test_it_is_a_sink(self, monkeypatch):
        pytest.importorskip("rich")
        monkeypatch.setenv("TERM", "xterm")
        check_sink(lambda: Console(stream=Terminal()))

    @pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
    def test_a_terminal_shows_a_live_bar_below_what_the_program_prints(self):
        pytest.importorskip("rich")
        screen = on_a_terminal(
            """
            from mb_config.records import EvalEvent, RunEnd, RunInfo, StepEvent
            from mb_logging import Console, Recorder
            import sys

            with Recorder(Console()) as log:
                log.on_event(RunInfo(run_name="bars", total_steps=8, device="cpu"))
                for step in range(1, 9):
                    log.on_event(StepEvent(step=step, consumed_samples=1, consumed_tokens=1,
                        loss=step / 4, learning_rate=1e-3, grad_norm=0.5, seconds=0.1,
                        tokens_per_second=4321.0, metrics={"accuracy": 0.5}))
                    log.flush()
                    if step == 4:
                        print("the program says hello")
                        log.on_event(EvalEvent(step=4, name="validation", loss=1.5, perplexity=4))
                log.on_event(RunEnd(step=8, reason="train_iters=8 reached"))
            print("after", type(sys.stdout).__name__)
            """
        )
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
        assert "bars: cpu, 1 rank, to step 8" in plain
        assert "the program says hello" in plain
        assert "step      4  validation: loss 1.5000  perplexity 4.00" in plain
        assert re.search(r"━+ +8/8 +ETA 0:00 +4,321 tokens/s", plain)
        assert "loss 2.0000  lr 1.00e-03  grad norm 0.500  accuracy 0.5" in plain
        assert "\x1b[1A" in screen, "the bar is drawn over itself"
        assert plain.index("8/8") < plain.index("ended after step 8")
        assert plain.rstrip().endswith("after TextIOWrapper"), "standard output is given back"
        assert screen.count("\x1b[?25l") == screen.count("\x1b[?25h"), "the cursor is given back"


def on_a_terminal(code):
    """Run *code* with its output on a pseudo-terminal of 100 columns; return what it shows."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "COLUMNS"}}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env=env | {"TERM": "xterm"}
    ) as run:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert run.returncode == 0, shown.decode()
    return shown.decode()


class TestProgress:
    def test_time_left_is_drawn_out_from_the_first_report(self, step_event, clock):
        progress = Progress(total=100, clock=clock)
        clock.now += 1000.0
        progress.add(step_event(10))
        clock.now += 30.0  # two seconds a step, and an evaluation of ten
        progress.add(step_event(20))
        assert progress.seconds_left == pytest.approx(80 * 3.0)
        assert (progress.done, progress.fraction, progress.is_complete) == (20, 0.2, False)

    def test_the_first_report_goes_by_its_own_time(self, step_event, clock):
        progress = Progress(total=100, clock=clock)
        progress.add(step_event(10, seconds=2.0))
        assert progress.seconds_left == pytest.approx(180.0)

    def test_a_resumed_run_is_not_faster_than_it_is(self, step_event, clock):
        progress = Progress(total=1000, clock=clock)
        progress.restart(start_step=900)
        progress.add(step_event(910))
        clock.now += 10.0
        progress.add(step_event(920))
        assert progress.seconds_left == pytest.approx(80.0)

    def test_a_loop_that_counts_from_zero_gets_to_its_end(self, step_event, clock):
        progress = Progress(total=3, clock=clock)
        for step in range(3):
            progress.add(step_event(step))
        assert progress.is_complete
        assert progress.fraction == 1.0

    def test_without_an_end_nothing_is_guessed(self, step_event, clock):
        progress = Progress(clock=clock)
        progress.add(step_event(1, seconds=1.0))
        assert (progress.seconds_left, progress.fraction, progress.is_complete) == (
            None,
            0.0,
            False,
        )


def test_sample_events_are_all_shown_without_an_error(capsys):
    console = Console(interval_s=0.0)
    for event in sample_events():
        console.write(event)
    console.close()
    shown = capsys.readouterr().out
    assert "loss      inf" in shown
    assert "grad norm      nan" in shown
    assert "loss scale 65536" in shown
    assert "skipped 1" in shown
