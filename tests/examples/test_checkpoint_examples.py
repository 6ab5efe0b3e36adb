# SPDX-License-Identifier: Apache-2.0
"""Each example, stopped and started again, ends where one that was never stopped ends."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mb_ckpt import CheckpointStore

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
STOP, STEPS = 6, 10
LOGGED = re.compile(r"'loss': '?([\d.]+)")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example up to a step; returns what it prints."""

    def here(name, folder, steps):
        monkeypatch.setattr("sys.argv", [name, *_arguments(folder, steps)])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return here


def run_on_two_ranks(name, folder, steps):
    process = subprocess.run(
        [sys.executable, *TORCHRUN, str(EXAMPLES / name), *_arguments(folder, steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def _arguments(folder, steps):
    return [f"--folder={folder}", f"--steps={steps}", "--save-every=4"]


def losses(output):
    return {int(s): float(x) for s, x in re.findall(r"step (\d+) loss (\S+)", output)}


def test_the_plain_loop_goes_on_bit_for_bit(tmp_path, run):
    name = "checkpoint_plain_loop.py"
    whole = losses(run(name, tmp_path / "whole", STEPS))
    first = losses(run(name, tmp_path / "parts", STOP))
    rest = losses(run(name, tmp_path / "parts", STEPS))
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert sorted(rest) == list(range(STOP + 1, STEPS + 1))
    assert first | rest == whole
    with CheckpointStore(tmp_path / "parts") as store:
        assert store.steps() == [8, 10]


@pytest.mark.dist
def test_fsdp_goes_on_without_fsdp_and_the_other_way_round(tmp_path, run):
    name = "checkpoint_fsdp2.py"
    whole = losses(run(name, tmp_path / "whole", STEPS))
    # Two halves of a batch are added in another order: float32 roundings of losses near 2.
    for begin, end in ((run_on_two_ranks, run), (run, run_on_two_ranks)):
        folder = tmp_path / begin.__name__
        first = losses(begin(name, folder, STOP))
        rest = losses(end(name, folder, STEPS))
        assert sorted(rest) == list(range(STOP + 1, STEPS + 1))
        assert first | rest == pytest.approx(whole, rel=0, abs=1e-5)
    assert abs(whole[1] - whole[STOP + 1]) > 1e-2, "nothing was learned that could be lost"


def test_the_trainer_goes_on_bit_for_bit(tmp_path, run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "checkpoint_hf_trainer.py"
    whole = run(name, tmp_path / "whole", STEPS).splitlines()
    first = run(name, tmp_path / "parts", STOP).splitlines()
    rest = run(name, tmp_path / "parts", STEPS).splitlines()
    assert whole[-1] == rest[-1]
    assert f"after step {STEPS} the parameters add up to" in whole[-1]
    # After a resume Trainer divides the first loss by all steps so far; from the next on it is right.
    logged, expected = ([x for line in out for x in LOGGED.findall(line)] for out in (rest, whole))
    assert len(expected) == STEPS
    assert logged[1:] == expected[STOP + 1 :]
    assert len(first) > STOP
