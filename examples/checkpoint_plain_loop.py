# SPDX-License-Identifier: Apache-2.0
"""A plain PyTorch loop that saves in the background and goes on where it stopped.

    python examples/checkpoint_plain_loop.py --steps 40
    python examples/checkpoint_plain_loop.py --steps 80     # goes on at step 40

However often it is interrupted, it prints the losses of a run that never was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mb_ckpt import CheckpointStore
from torch import nn


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the data of *step*, which alone decides it: so the step is the data position."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 16, generator=generator)
    return x, x.square().sum(1, keepdim=True)


def main() -> None:
    """Train up to ``--steps``, from the newest checkpoint where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/plain"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.5)
    training = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    # Lazy: save() returns at once, and the copy runs behind the next forward and backward pass.
    with CheckpointStore(arguments.folder, staging="lazy", keep_last=2) as store:
        done = 0
        if store.steps():
            random_state = torch.get_rng_state()
            progress = store.load({**training, "rng": random_state})  # fills all of it in place
            torch.set_rng_state(random_state)
            done = progress["step"]
        saving = None
        for step in range(done + 1, arguments.steps + 1):
            x, y = batch(step)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            if saving is not None:
                saving.wait_staged()  # the fence: from here on the parameters change
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            print(f"step {step} loss {loss.item()!r}")
            if step % arguments.save_every == 0 or step == arguments.steps:
                saving = store.save(step, {**training, "rng": torch.get_rng_state(), "step": step})


if __name__ == "__main__":
    main()
