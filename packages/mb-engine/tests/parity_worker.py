# SPDX-License-Identifier: Apache-2.0
"""What each rank of a parity run does: train on fixed data and return what it saw."""

from __future__ import annotations

import torch

from mb_engine import Engine
from mb_engine.testing import tiny_config

GLOBAL_BATCH = 8


def fixed_batches(config, layout, steps):
    """Yield the micro-batches of one data-parallel rank; the global batch is the same for all."""
    generator = torch.Generator().manual_seed(20)
    vocabulary, length = config.model.vocab_size, config.model.seq_length
    mbs = config.train.micro_batch_size
    for _ in range(steps):
        ids = torch.randint(0, vocabulary, (GLOBAL_BATCH, length + 1), generator=generator)
        mask = (torch.rand(GLOBAL_BATCH, length, generator=generator) > 0.1).float()
        rows = [
            slice(start + layout.dp_rank * mbs, start + (layout.dp_rank + 1) * mbs)
            for start in range(0, GLOBAL_BATCH, mbs * layout.dp)
        ]
        yield [
            {
                "tokens": ids[row, :-1].contiguous(),
                "labels": ids[row, 1:].contiguous(),
                "loss_mask": mask[row],
                "position_ids": torch.arange(length).expand(mbs, -1),
            }
            for row in rows
        ]


def train(overrides, steps):
    """Return losses, gradient norms and a fingerprint of the replicated parameters."""
    config = tiny_config(
        f"train.global_batch_size={GLOBAL_BATCH}", f"train.train_iters={steps}", *overrides
    )
    engine = Engine.from_config(config)
    losses, norms = [], []
    for batches in fixed_batches(engine.config, engine.layout, steps):
        losses.append(float(engine.forward_backward(batches).loss))
        norms.append(engine.optimizer_step().grad_norm)
    with engine.synced_parameters():
        replicated = [
            (name, parameter.detach().double().sum().item())
            for chunk in engine.model
            for name, parameter in chunk.named_parameters()
            if not getattr(parameter, "tensor_model_parallel", False)
        ]
    engine.close()
    return {"losses": losses, "norms": norms, "replicated": replicated}
