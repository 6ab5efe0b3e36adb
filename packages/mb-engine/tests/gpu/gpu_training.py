# SPDX-License-Identifier: Apache-2.0
"""The training that all GPU comparisons run: one repeated batch, 20 steps, one rank.

A test of the CPU suite runs it as well, so that a mistake in it is found without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from mb_engine import Engine
from mb_engine.testing import run_ranks, tiny_config

STEPS = 20
CUDA = ("dist.device=cuda", "model.megatron.use_cpu_initialization=true")
SHAPE = (  # FP8 and FP4 kernels want sizes that are multiples of 32
    "model.hidden_size=128",
    "model.ffn_hidden_size=256",
    "train.train_iters=20",
    "optimizer.lr=3e-3",
    "optimizer.adam_eps=1e-5",
    "scheduler.lr_decay_style=constant",
)
TORCH, TE = ("model.layer_spec=torch",), ("model.layer_spec=te",)
BF16 = ("mixed_precision=bf16_mixed",)
SHARDED = ("optimizer.use_distributed_optimizer=true",)


def batches(device: str) -> list[dict[str, torch.Tensor]]:
    """Return four micro-batches of two sequences, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (8, 33), generator=generator)
    return [
        {
            "tokens": ids[row : row + 2, :-1].contiguous().to(device),
            "labels": ids[row : row + 2, 1:].contiguous().to(device),
            "loss_mask": torch.ones(2, 32, device=device),
            "position_ids": torch.arange(32, device=device).expand(2, -1),
        }
        for row in range(0, 8, 2)
    ]


def train(overrides: list[str], steps: int = STEPS) -> dict[str, Any]:
    """Return losses, device and peak memory of *steps* steps, and what generation gives."""
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = Engine.from_config(tiny_config(*SHAPE, *overrides))
    device = torch.device(engine.layout.device)
    data = batches(engine.layout.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, scales, updates = [], [], 0
    for _ in range(steps):
        losses.append(float(engine.forward_backward(data).loss))
        done = engine.optimizer_step()
        scales.append(done.loss_scale)
        updates += done.updated
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    devices = sorted({s.data.device.type for s in engine.state()["model"]})
    text = engine.generate([1, 2, 3], 4, temperature=0)
    engine.close()
    return {
        "losses": losses,
        "scales": scales,
        "updates": updates,
        "peak_bytes": peak,
        "devices": devices,
        "generated": len(text),
    }


def run(*overrides: str, steps: int = STEPS) -> dict[str, Any]:
    """Train in a process of its own, which leaves no memory behind."""
    done: dict[str, Any] = run_ranks(train, 1, list(overrides), steps, timeout_s=400)[0]
    on_cuda = "dist.device=cuda" in overrides
    assert done["devices"] == (["cuda"] if on_cuda else ["cpu"])
    assert done["generated"] == 7
    return done


def losses_of(*overrides: str) -> list[float]:
    """Return the losses of :func:`run`, which must have gone down."""
    losses: list[float] = run(*overrides)["losses"]
    assert losses[-1] < losses[0] - 0.3, losses
    return losses
