# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint with our files, against its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from mb_ckpt import CheckpointStore
from mb_ckpt.torch_dcp import TensorStoreReader, TensorStoreWriter
from torch.distributed.checkpoint.api import CheckpointException  # what DCP makes of any error

WORKER = Path(__file__).with_name("dcp_worker.py")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")


@pytest.mark.dist
@pytest.mark.parametrize("name", ["reshard", "training", "failures"])
def test_two_ranks(name, tmp_path):
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                command = [sys.executable, WORKER, name, str(rank), "2", tmp_path]
                ranks.append(subprocess.Popen(command, stdout=out, stderr=out))
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)


def state(fill=None):
    values = {
        "bf16": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "bool": torch.tensor([True, False]),
    }
    if fill is not None:
        values = {key: torch.full_like(value, fill) for key, value in values.items()}
    return {"tensors": values, "lr": 0.1 if fill is None else 0.0}


def test_one_process_loads_what_it_saved(tmp_path):
    dcp.save(state(), storage_writer=TensorStoreWriter(tmp_path, step=7, keep_last=1))
    room = state(fill=0)
    dcp.load(room, storage_reader=TensorStoreReader(tmp_path))
    assert room["lr"] == 0.1
    assert all(torch.equal(room["tensors"][k], v) for k, v in state()["tensors"].items())
    wider = {"tensors": {"bf16": torch.zeros(5, 3)}}
    dcp.load(wider, storage_reader=TensorStoreReader(tmp_path))
    assert torch.equal(wider["tensors"]["bf16"], state()["tensors"]["bf16"].float())


def test_a_step_of_a_store_is_read_through_dcp(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    with CheckpointStore(tmp_path) as store:
        store.save(4, {"model": model, "epoch": 2})
    room = {"model": torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).state_dict()}
    dcp.load(room, storage_reader=TensorStoreReader(tmp_path))
    assert all(torch.equal(room["model"][k], v) for k, v in model.state_dict().items())


def test_what_is_wrong_is_named(tmp_path):
    room = {"w": torch.zeros(2)}
    with pytest.raises(CheckpointException, match="no checkpoint in"):
        dcp.load(room, storage_reader=TensorStoreReader(tmp_path))
    dcp.save({"w": torch.ones(2)}, storage_writer=TensorStoreWriter(tmp_path))
    with pytest.raises(CheckpointException, match="no step 5"):
        dcp.load(room, storage_reader=TensorStoreReader(tmp_path, step=5))
    data = next(tmp_path.glob("step_*/data-*/rank_*/c/0"))
    raw = bytearray(data.read_bytes())
    raw[1] ^= 1
    data.write_bytes(raw)
    with pytest.raises(CheckpointException, match=r"CorruptCheckpointError: .*'w'"):
        dcp.load(room, storage_reader=TensorStoreReader(tmp_path))
