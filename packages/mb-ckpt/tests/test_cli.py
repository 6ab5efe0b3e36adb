# SPDX-License-Identifier: Apache-2.0
"""What the command prints, and how it ends."""

from __future__ import annotations

import json

import pytest
import torch
from mb_ckpt import CheckpointStore
from mb_ckpt.cli import main
from safetensors.torch import load_file, save_file


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


def test_export_and_import_go_by_way_of_safetensors(run, tmp_path, capsys):
    out, there = str(tmp_path / "out"), str(tmp_path / "there")
    names = ["--prefix", "model.", "--strip-prefix", "model.", "--rename", "w=a.weight"]
    assert main(["export", str(run), out, "--to", "safetensors", "--step", "10", *names]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}: step 10, 1 tensors, 2.4 KB\n"
    assert not captured.err  # no bar without a terminal
    assert load_file(f"{out}/model.safetensors")["a.weight"].shape == (20, 30)
    command = ["import", out, there, "--layout", "zarr", "--compression", "zstd"]
    assert main([*command, "--rename", "a.=b.", "--rename", "b=c", "--add-prefix", "net."]) == 2
    assert "rename 'b' begins none of 1 keys: a.weight" in capsys.readouterr().err
    assert main([*command, "--rename", "a.=b.", "--add-prefix", "net."]) == 0
    path = f"{there}/step_00000010"
    assert capsys.readouterr().out == f"{path}: 1 tensors, 2.4 KB, from safetensors\n"
    with CheckpointStore(there) as store:
        info = store.inspect()
        assert (info.layout, info.compression, list(info.tensors)) == ("zarr", 3, ["net.b.weight"])
    assert main([*command, "--replace", "--json", "--from", "safetensors"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "step": 10, "path": path, "format": "safetensors", "tensors": 1, "nbytes": 2400,
        "left_out": [],
    }  # fmt: skip


def test_export_prints_json_and_both_end_with_2_and_one_line(run, tmp_path, capsys):
    out = str(tmp_path / "out")
    export = ["export", str(run), out, "--to", "safetensors"]
    assert main([*export, "--max-shard-size", "2400", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "step": 20, "path": out, "format": "safetensors", "tensors": 2, "nbytes": 2408,
    }  # fmt: skip
    assert main(["import", out, str(tmp_path / "there"), "--step", "7", "--prefix", "s"]) == 0
    capsys.readouterr()
    for command, text in [
        (export, f"mb-ckpt: {out} is there and no empty folder"),
        ([*export, "--rename", "x"], "mb-ckpt: --rename x: expected OLD=NEW"),
        (["import", out, str(tmp_path / "there"), "--step", "7"], "mb-ckpt: step 7 is in "),
        (["import", out, str(tmp_path / "there"), "--step", "-7"], "mb-ckpt: step=-7: expected"),
        (["import", str(run / "nothing"), out], "mb-ckpt: "),
    ]:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(text)
        assert error.count("\n") == 1


def test_what_is_left_out_is_said(tmp_path, capsys):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "other.safetensors")
    assert main(["import", str(tmp_path), str(tmp_path / "run")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "left out other.safetensors: not one of the files of model.safetensors"
    assert second.endswith("step_00000000: 1 tensors, 8 B, from safetensors")


def test_a_terminal_sees_how_far_it_is(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "safetensors"]) == 0
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "there")]) == 0
    assert main(["diff", str(run), str(tmp_path / "there")]) == 0
    assert main(["verify", str(run)]) == 0
    error = capsys.readouterr().err
    for label in ("exporting", "importing", "comparing", "verifying"):
        assert f"{label} 100% [" in error
    assert "] 2.4 KB of 2.4 KB, " in error
    assert error.endswith("\r\x1b[K")


@pytest.mark.parametrize("layout", ["packed", "zarr"])
def test_verifying_counts_up_to_all_bytes(tmp_path, layout):
    seen = []
    with CheckpointStore(tmp_path, layout=layout) as store:
        store.save(1, {"w": torch.zeros(15 << 20, dtype=torch.uint8), "v": torch.ones(1 << 20)})
        store.wait()
        nbytes = store.verify(progress=lambda *at: seen.append(at)).nbytes
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (nbytes, nbytes)
    assert nbytes >= 19 << 20
