# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks save together; all of them hear of a failure on any."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mb_ckpt import CheckpointStore
from mb_config.records import TensorShard

WORKER = Path(__file__).with_name("ranks_worker.py")
WIDE = torch.arange(7 * 10, dtype=torch.float32).reshape(7, 10)
FLAT = torch.arange(4 * 9, dtype=torch.int64).reshape(4, 9)

pytestmark = pytest.mark.dist


def run(name, root, codes=(0, 0)):
    """Run a case of the worker on as many ranks as there are *codes*; they must end with those, within two minutes."""
    logs = [root / f"{name}.{rank}.log" for rank in range(len(codes))]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                command = [sys.executable, WORKER, name, str(rank), str(len(codes)), root]
                ranks.append(subprocess.Popen(command, stdout=out, stderr=out))
        found = tuple(rank.wait(timeout=120) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert found == codes, "\n".join(log.read_text() for log in logs)


def test_what_two_ranks_save_both_layouts_and_one_rank_load(tmp_path):
    run("layouts", tmp_path)
    wide, flat = torch.zeros(7, 10), torch.zeros(4, 9, dtype=torch.int64)
    stages = [torch.zeros(3), torch.zeros(3)]
    with CheckpointStore(tmp_path / "save_and_load") as store:
        plain = store.load({"wide": wide, "flat": flat, "stage0": {"w": stages[0]}, "s": [
            TensorShard(
                key="stage1.w", data=stages[1], global_shape=(3,), offset=(0,), local_shape=(3,),
                dtype="float32",
            ),
        ]})  # fmt: skip
        info = store.inspect()
        store.verify()
    assert torch.equal(wide, WIDE)
    assert torch.equal(flat, FLAT)
    assert [s.tolist() for s in stages] == [[1.0] * 3, [2.0] * 3]
    assert plain["n"] == {"rank": 0, "lr": 0.5}
    assert info.world_size == 2
    # 17 elements of 4 x 9 are one whole row and a part, the other 19 a part and two rows.
    assert {key: t.pieces for key, t in info.tensors.items()} == {
        "wide": 2, "flat": 4, "norm": 1, "stage0.w": 1, "stage1.w": 1, "plain": 1,
    }  # fmt: skip


def test_every_way_of_writing_works_on_two_ranks_and_shares_the_work(tmp_path):
    run("kinds", tmp_path)
    for kind in range(5):
        wide, flat = torch.zeros(7, 10), torch.zeros(4, 9, dtype=torch.int64)
        with CheckpointStore(tmp_path / "kinds" / str(kind)) as store:
            store.load({"wide": wide, "flat": flat})
            store.verify(1)
        assert torch.equal(wide, WIDE)
        assert torch.equal(flat, FLAT)


def test_fsdp2_resumes_and_one_rank_without_it_goes_on_from_there(tmp_path):
    run("fsdp", tmp_path)


def test_two_ranks_load_what_one_rank_saved(tmp_path):
    with CheckpointStore(tmp_path / "load_from_one") as store:
        store.save(1, {
            "wide": WIDE, "flat": FLAT, "norm": torch.ones(5), "plain": torch.full((2,), 8.0),
            "stage0": {"w": torch.full((3,), 1.0)}, "stage1": {"w": torch.full((3,), 2.0)},
        })  # fmt: skip
    run("load", tmp_path)


def test_a_failure_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path):
    run("failures", tmp_path)
    with CheckpointStore(tmp_path / "failures") as store:
        assert store.steps() == [1, 4]


def test_a_rank_that_dies_while_saving_leaves_the_last_step(tmp_path):
    run("death", tmp_path, codes=(0, 9, 0))
    with CheckpointStore(tmp_path / "death") as store:
        assert store.steps() == [1, 2]
        store.verify(2)
        store.save(4, {"w": torch.ones(1)}).result()
    assert sorted(p.name for p in (tmp_path / "death").iterdir()) == [
        "alone", "step_00000001", "step_00000002", "step_00000004",
    ]  # fmt: skip
