# SPDX-License-Identifier: Apache-2.0
"""The command looks at metrics files and never shows a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import attrs
import pytest
from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent
from mb_logging import JSONL, Recorder, summarize
from mb_logging.cli import main
from mb_logging.testing import sample_events


@pytest.fixture
def metrics(tmp_path, step_event):
    """Return a file of a run that was killed and resumed."""
    path = tmp_path / "metrics.jsonl"
    fast = {"tokens_per_second": 1000.0, "tflops_per_device": 98.94}
    info = RunInfo(
        run_name="run7",
        num_parameters=1_500_000,
        device="NVIDIA H100 PCIe",
        layout="TP2",
        total_steps=60,
    )
    events = [
        info,
        *(step_event(s, loss=6.0 - s / 10, **fast) for s in range(10, 41, 10)),
        EvalEvent(step=20, name="validation", loss=4.0, perplexity=54.6),
        EvalEvent(step=40, name="validation", loss=1.0, perplexity=2.7),
        SaveEvent(step=30, path="ckpt", status="started"),
        SaveEvent(step=30, path="ckpt", status="saved"),
        attrs.evolve(info, start_step=30, layout="DP2"),
        *(step_event(s, loss=5.0 - s / 100, skipped_steps=1, **fast) for s in range(40, 61, 10)),
        EvalEvent(step=60, name="validation", loss=3.5, perplexity=33.1),
        SaveEvent(step=60, path="ckpt", status="failed", error="disk full"),
        RunEnd(step=60, reason="train_iters=60 reached", seconds=125.0),
    ]
    sink = JSONL(path)
    for event in events:
        sink.write(event)
    sink.close()
    return path


def test_summary_says_what_came_out(metrics, capsys):
    assert main(["summary", str(metrics)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {name: fact.strip() for name, fact in lines.items()}
    assert facts == {
        "run": "run7, 1.50 M parameters, NVIDIA H100 PCIe",
        "parts": "2: TP2, then DP2",
        "steps": "60 (15.36 k tokens)",
        "skipped": "3",
        "training loss": "5.0000 at first, 4.4000 at last",
        "best validation": "3.5000 (perplexity 33.12) at step 60",
        "speed": "1,000 tokens/s, 98.9 TFLOP/s, MFU 13.1%",
        "checkpoints": "1 saved, 1 failed",
        "time": "2:05",
        "end": "train_iters=60 reached",
    }


def test_summary_as_json_has_the_same_facts(metrics, capsys):
    assert main(["summary", "--json", str(metrics)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["step"], data["best"], data["layouts"]) == (
        60,
        {"validation": [3.5, 60]},
        ["TP2", "DP2"],
    )


def test_summary_as_json_is_json_after_a_loss_that_is_none(tmp_path, step_event, capsys):
    path = tmp_path / "metrics.jsonl"
    with Recorder(JSONL(path)) as recorder:
        recorder.on_event(step_event(1, loss=float("nan")))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert main(["summary", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=refuse)["last_loss"] == "nan"


def test_a_line_of_wrong_types_is_passed_over_by_every_command(metrics, tmp_path, capsys):
    with metrics.open("a") as file:
        file.write('{"kind": ["step"]}\n{"kind": "end", "step": "x", "reason": "r"}\n')
    for command in (["summary"], ["tail"], ["plot"]):
        assert main([*command, str(metrics)]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_that_goes_on_has_no_end():
    assert summarize(sample_events()[:-1]).end is None
    assert summarize([*sample_events(), sample_events()[0]]).end is None
    assert summarize(sample_events()).end == "train_iters=2 reached"
    assert summarize([]).first_loss is None


def test_tail_prints_the_last_records(metrics, capsys):
    assert main(["tail", "-n", "3", str(metrics)]) == 0
    evaluation, failed, end = capsys.readouterr().out.splitlines()
    assert evaluation.endswith("step     60  validation: loss 3.5000  perplexity 33.10  (0.0 s)")
    assert failed.endswith("step     60  CHECKPOINT FAILED: disk full")
    assert end.endswith("ended after step 60: train_iters=60 reached (2:05)")
    assert main(["tail", "-n", "100", str(metrics)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15  # every record but the begun save
    assert "MFU 13.1%" in lines[1]
    assert "step     10/60" in lines[1]


def test_tail_follows_a_run_until_it_ends(tmp_path, step_event):
    path = tmp_path / "metrics.jsonl"
    sink = JSONL(path)
    sink.write(sample_events()[0])
    code = "import sys; from mb_logging.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "tail", "--follow", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        assert "sample" in tail.stdout.readline()  # it has come to the end of the file
        whole = json.dumps({"kind": "end", "time": 0, "step": 9, "reason": "stopped by hand"})
        sink.write(step_event(8))
        with path.open("a") as file:
            file.write("not a record\n" + whole[:20])
            file.flush()
            time.sleep(0.6)  # longer than a poll, so that it sees half a line
            file.write(whole[20:] + "\n")
        out, _ = tail.communicate(timeout=30)
    sink.close()
    assert "loss   5.4200" in out
    assert out.splitlines()[-1].endswith("ended after step 9: stopped by hand (0:00)")
    assert len(out.splitlines()) == 2
    assert tail.returncode == 0


def test_plot_draws_beside_the_file_or_where_it_is_told(metrics, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(metrics)]) == 0
    assert capsys.readouterr().out.strip() == str(metrics.with_name("loss.png"))
    assert main(["plot", str(metrics), str(tmp_path / "a.svg"), "--title", "seven"]) == 0
    assert "seven" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "no.jsonl"], "no.jsonl: cannot be read (No such file or directory); give"),
        (["tail", "no.jsonl"], "no.jsonl: cannot be read (No such file or directory); give"),
        (["plot", "no.jsonl"], "no.jsonl: cannot be read (No such file or directory); give"),
        (["summary", "empty.jsonl"], "empty.jsonl: no records; give a file that the jsonl"),
        (["plot", "empty.jsonl"], "empty.jsonl: no step to draw; give a file that the jsonl"),
        (["tail", "-n", "-1", "empty.jsonl"], "--lines=-1: give how many"),
        (["summary", "."], ".: cannot be read (Is a directory)"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mb-log: {message}")
    assert error.count("\n") == 1


def test_the_command_is_installed_and_a_closed_pipe_is_no_error(metrics):
    code = "import sys; from mb_logging.cli import main; sys.exit(main(sys.argv[1:]))"
    shell = f"{sys.executable} -c '{code}' tail -n 99 {metrics} | head -n 1"
    run = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    assert "run7" in run.stdout
    assert run.stderr == ""
    from importlib.metadata import entry_points

    assert next(iter(entry_points(group="console_scripts", name="mb-log"))).load() is main
