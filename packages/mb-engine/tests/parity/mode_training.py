# SPDX-License-Identifier: Apache-2.0
"""Training runs to compare, as ranks run them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from mb_engine import Engine
from mb_engine.runtime.distributed import shutdown
from mb_engine.testing import tiny_config
from mb_engine.train.batch_size import BatchSizeSchedule

# Of one packed row; a rank of CP2 gets two of four equal chunks of each.
LENGTHS = (8, 16, 8)


class Run(NamedTuple):
    """What to train.

    Attributes:
        overrides: Over the tiny configuration.
        packed: Whether each row holds samples of :data:`LENGTHS` that must not see each other.
    """

    overrides: tuple[str, ...]
    packed: bool = False


def global_batches(config, steps):
    """Yield the samples of each step: the same whatever the layout."""
    generator = torch.Generator().manual_seed(20)
    vocabulary, length = config.model.vocab_size, config.model.seq_length
    schedule = BatchSizeSchedule.from_config(config)
    most = schedule.target_batch_size
    ids = torch.randint(0, vocabulary, (most, length + 1), generator=generator)
    mask = (torch.rand(most, length, generator=generator) > 0.1).float()
    consumed = 0
    for _ in range(steps):
        size = schedule.global_batch_size(consumed)
        yield {
            "tokens": ids[:size, :-1],
            "labels": ids[:size, 1:],
            "loss_mask": mask[:size],
            "position_ids": torch.arange(length).expand(size, -1),
        }
        consumed += size


def micro_batches(batch, layout, size, *, packed=False):
    """Return the micro-batches of one data-parallel rank, in order."""
    samples = len(batch["tokens"])
    starts = range(layout.dp_rank * size, samples, size * layout.dp)
    parts = [{k: v[s : s + size].contiguous() for k, v in batch.items()} for s in starts]
    if packed:
        for part in parts:
            part["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(LENGTHS)])
            part["position_ids"] = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return parts


def train(run, steps):
    """Train on this rank.

    Returns:
        A mapping: ``losses`` and ``norms`` (gradients, before clipping) a step, ``scales`` of the
        loss, ``parameters_norm`` at the end, and the sums of the parameters that tensor-parallel
        ranks hold alike as ``replicated``.
    """
    engine = Engine.from_config(tiny_config(*run.overrides))
    losses, norms, scales = [], [], []
    size = engine.config.train.micro_batch_size
    for batch in global_batches(engine.config, steps):
        mine = micro_batches(batch, engine.layout, size, packed=run.packed)
        losses.append(float(engine.forward_backward(mine).loss))
        outcome = engine.optimizer_step()
        norms.append(outcome.grad_norm)
        scales.append(outcome.loss_scale)
    replicated = {
        name: parameter.detach().double().sum().item()
        for chunk in engine.model
        for name, parameter in chunk.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    }
    norm = engine.parameters_norm()
    engine.close()
    return {
        "losses": losses,
        "norms": norms,
        "scales": scales,
        "parameters_norm": norm,
        "replicated": replicated,
    }


def train_all(cases, steps):
    """Train once with each of *cases*, one after the other in the same processes."""
    results = []
    for run in cases:
        try:
            results.append(train(run, steps))
        except Exception as error:
            error.add_note(f"while training {run}")
            raise
    return results


def train_guarded(cases, steps):
    """Do what :func:`train_all` does; a case that fails gives its error as a text."""
    results = []
    for run in cases:
        try:
            results.append(train(run, steps))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
            shutdown()
    return results
