# SPDX-License-Identifier: Apache-2.0
"""Run by test_torch_dcp.py, once a rank: ``dcp_worker.py CASE RANK SIZE DIRECTORY``."""

from __future__ import annotations

import faulthandler
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mb_ckpt import CheckpointError, CheckpointStore
from mb_ckpt.torch_dcp import TensorStoreReader, TensorStoreWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

WIDE = torch.arange(70, dtype=torch.float32).reshape(7, 10)


def state(placement, fill=None):
    mesh = init_device_mesh("cpu", (2,))
    wide = WIDE if fill is None else torch.full_like(WIDE, fill)
    return {
        "wide": distribute_tensor(wide.clone(), mesh, [placement]),
        "plain": torch.arange(5) if fill is None else torch.zeros(5, dtype=torch.int64),
        "nested": {
            "step": 3 if fill is None else None,
            "names": ["a", "b"] if fill is None else [],
        },
    }


def reshard(rank, root):
    dcp.save(state(Shard(0)), storage_writer=TensorStoreWriter(root / "ours"))
    dcp.save(state(Shard(0)), checkpoint_id=str(root / "theirs"))
    for placement in (Shard(0), Shard(1), Replicate()):
        ours, theirs = state(placement, fill=-1.0), state(placement, fill=-1.0)
        dcp.load(ours, storage_reader=TensorStoreReader(root / "ours"))
        dcp.load(theirs, checkpoint_id=str(root / "theirs"))
        assert torch.equal(ours["wide"].to_local(), theirs["wide"].to_local())
        assert torch.equal(ours["wide"].full_tensor(), WIDE)
        assert torch.equal(ours["plain"], theirs["plain"])
        assert ours["nested"] == theirs["nested"] == {"step": 3, "names": ["a", "b"]}


def network(mesh):
    torch.manual_seed(3)
    layers = [torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 2)]
    model = torch.nn.Sequential(*layers)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(4, 6, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def training(rank, root):
    """FSDP2 goes on from an asynchronous save, and a store reads the same step without DCP."""
    mesh = init_device_mesh("cpu", (2,))
    model, optimizer = network(mesh)
    train(model, optimizer, range(3))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    saved = {"model": model_state, "optimizer": optimizer_state}
    writer = TensorStoreWriter(root)
    dcp.async_save(saved, checkpoint_id="iter_0000003", storage_writer=writer).result()
    expected = train(model, optimizer, range(3, 6))
    model, optimizer = network(mesh)
    train(model, optimizer, range(7, 8))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    room = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(room, storage_reader=TensorStoreReader(root, step=3))
    set_state_dict(
        model, optimizer, model_state_dict=room["model"], optim_state_dict=room["optimizer"]
    )
    assert train(model, optimizer, range(3, 6)) == expected
    dense, _ = network(None)
    with CheckpointStore(root) as store:
        assert store.steps() == [3]
        store.load({"model": dense})
        store.verify()


def fail(item):
    raise ValueError("no data")


def failures(rank, root):
    """A rank without data stops the save on all, and the step before it stays."""
    for _ in range(2):  # a writer a save, as many write it
        dcp.save({"w": torch.ones(3)}, storage_writer=TensorStoreWriter(root))
    planner = dcp.DefaultSavePlanner()
    if rank:
        planner.resolve_data = fail
    mine = {f"of rank {rank}": torch.ones(2)}
    with pytest.raises(CheckpointException, match="no data"):
        dcp.save(mine, storage_writer=TensorStoreWriter(root), planner=planner)
    with CheckpointStore(root) as store:
        assert store.steps() == [1, 2]
    with pytest.raises(CheckpointError, match="ends with it, such as iter_0000100"):
        TensorStoreWriter(root).reset("newest")


CASES = {"reshard": reshard, "training": training, "failures": failures}


def main():
    name, rank, size, root = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    faulthandler.dump_traceback_later(80, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/{name}.meeting", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    CASES[name](rank, root / name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
