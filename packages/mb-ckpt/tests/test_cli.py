# SPDX-License-Identifier: Apache-2.0
"""What the command prints, and how it ends."""

from __future__ import annotations

import json

import pytest
import torch
from mb_ckpt import CheckpointStore
from mb_ckpt.cli import main


@pytest.fixture
def run(tmp_path):
    with CheckpointStore(tmp_path) as store:
        for step in (10, 20):
            store.save(step, {"model": {"w": torch.zeros(20, 30)}, "s": torch.tensor(1), "lr": 0.5})
    return tmp_path


def test_ls_lists_the_steps(run, capsys):
    assert main(["ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["10", "2.4", "KB", "2"],
        ["20", "2.4", "KB", "2"],
    ]
    assert main(["ls", str(run), "--json"]) == 0
    assert [entry["step"] for entry in json.loads(capsys.readouterr().out)] == [10, 20]


def test_inspect_shows_tensors_and_plain_data(run, capsys):
    assert main(["inspect", str(run), "--step", "10"]) == 0
    out = capsys.readouterr().out
    assert f"step 10 in {run}/step_00000010" in out
    assert "model.w  float32   20x30" in out
    assert "s        int64     scalar" in out
    assert "plain data: {'model': {}, 'lr': 0.5}" in out
    assert main(["inspect", str(run), "--json", "--prefix", "model."]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["step"] == 20
    assert data["tensors"] == {
        "model.w": {"dtype": "float32", "shape": [20, 30], "nbytes": 2400, "pieces": 1}
    }


def test_prune_says_what_would_go_and_deletes_it(run, capsys):
    rules = ["--keep-last", "1", "--keep-every", "20"]
    with CheckpointStore(run) as store:
        store.save(30, {}, metrics={"loss": 1.0})
    assert main(["prune", str(run), *rules, "--dry-run"]) == 0
    assert capsys.readouterr().out == "would delete 10; kept 20, 30\n"
    assert main(["prune", str(run), *rules, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "deleted": [10], "kept": [20, 30], "dry_run": False,
    }  # fmt: skip
    with CheckpointStore(run) as store:
        assert store.steps() == [20, 30]
        store.save(40, {}, metrics={"loss": 2.0})
    assert main(["prune", str(run), "--keep-last", "1", "--keep-best", "loss"]) == 0
    assert capsys.readouterr().out == "deleted 20; kept 30, 40\n"
    assert main(["prune", str(run), "--keep-last", "0"]) == 2
    assert "--keep-last=0: give a number from 1 on" in capsys.readouterr().err


def test_verify_reads_everything_and_ends_with_2_on_damage(run, capsys):
    assert main(["verify", str(run), "--all"]) == 0
    assert "step 10: 2 tensors, 2.4 KB, all as written" in capsys.readouterr().out
    (path,) = (run / "step_00000020").glob("data-*/rank_00000/c/0")
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    assert main(["verify", str(run), "--json", "--step", "10"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["step"] == 10
    assert main(["verify", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rank_00000/c/0 is corrupt, it holds tensor 'model.w', 's'" in error


@pytest.mark.parametrize("command", ["ls", "inspect", "verify"])
def test_a_place_without_checkpoints_is_an_error_of_one_line(tmp_path, command, capsys):
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"mb-ckpt: no checkpoint in {tmp_path}: ")


def test_diff_names_what_two_steps_do_not_share(tmp_path, capsys):
    w = torch.arange(12.0).reshape(3, 4)
    state = {"w": w, "nan": torch.tensor([float("nan")]), "mine": torch.ones(1), "lr": 0.1,
             "kind": torch.zeros(2), "empty": torch.zeros(0)}  # fmt: skip
    other = state | {"w": w.clone(), "kind": torch.zeros(2).bfloat16(), "theirs": torch.ones(1)}
    other["lr"] = 0.2
    other["w"][1, 2] += 0.5
    other["w"][2, 3] -= 2
    del other["mine"]
    with CheckpointStore(tmp_path / "a") as a, CheckpointStore(tmp_path / "b") as b:
        a.save(1, state)
        b.save(5, state)
        b.save(6, other)
    places = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["diff", *places, "--other-step", "5"]) == 0
    assert capsys.readouterr().out == "5 tensors are the same bit for bit\n"
    assert main(["diff", *places]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "- mine",
        "+ theirs",
        "! kind: float32 2, there bfloat16 2",
        "~ w: 2 elements, at most 2 apart",
        "~ plain data",
        "2 tensors are the same bit for bit",
    ]
    assert main(["diff", *places, "--json", "--prefix", "w"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["changed"] == {"w": {"elements": 2, "largest": 2.0}}
    assert found["differs"]
    assert main(["diff", *places, "--step", "3"]) == 2
    assert "no step 3" in capsys.readouterr().err
