# SPDX-License-Identifier: Apache-2.0
"""A loop with FSDP2 that any number of ranks can go on with, one rank without FSDP included.

torchrun --nproc-per-node=2 examples/checkpoint_fsdp2.py --steps 20
python examples/checkpoint_fsdp2.py --steps 40          # goes on at step 20, on one rank
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from mb_ckpt import CheckpointStore
from torch import nn
from torch.distributed.fsdp import fully_shard

BATCH = 32


def build(device: torch.device) -> nn.Module:
    """Return the model, its layers and itself sharded where there are several ranks."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Linear(64, 8)).to(device)
    if dist.is_initialized():
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def batch(step: int, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's rows of the global batch of *step*."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 64, generator=generator)
    return x.chunk(ranks)[rank], x[:, :8].square().chunk(ranks)[rank]


def main() -> None:
    """Train up to ``--steps``, from the newest checkpoint where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/fsdp2"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=10)
    arguments = parser.parse_args()

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    model = build(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    state = {"model": model, "optimizer": optimizer}
    with CheckpointStore(arguments.folder, keep_last=2) as store:  # every rank makes its own
        done = store.load(state)["step"] if store.steps() else 0
        for step in range(done + 1, arguments.steps + 1):
            x, y = batch(step, rank, ranks)
            loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach() / ranks
            if ranks > 1:
                dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step} loss {mean.item()!r}")
            if step % arguments.save_every == 0 or step == arguments.steps:
                store.save(step, {**state, "step": step})
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
