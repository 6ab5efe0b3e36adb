# SPDX-License-Identifier: Apache-2.0
"""A run begun in one layout and gone on with in another, as ranks carry it out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from mb_engine import Engine
from mb_engine.compose import checkpointers_of
from mb_engine.data.loader import batches
from mb_engine.testing import tiny_config
from mb_engine.train.batch_size import BatchSizeSchedule

STEPS = 3
"""Before the save, and again after it."""
BASE = (
    "train.train_iters=8",
    "optimizer.lr=1e-2",
    "optimizer.min_lr=1e-4",
    # Adam's update is as large as its learning rate wherever a gradient is not quite zero, which
    # makes steps out of rounding noise; a larger eps keeps that out of the comparison.
    "optimizer.adam_eps=1e-5",
    "scheduler.lr_decay_style=cosine",
    "scheduler.lr_warmup_iters=2",
    "scheduler.start_weight_decay=0.01",
    "scheduler.end_weight_decay=0.1",
    "scheduler.weight_decay_incr_style=linear",
)


class Part(NamedTuple):
    """Half of a run.

    Attributes:
        name: Of the layout that began it: where its checkpoint is.
        overrides: Of the layout that this half has.
    """

    name: str
    overrides: tuple[str, ...]


class Text:
    """Samples that follow from their index alone."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(0, 128, (33,), generator=torch.Generator().manual_seed(index))
        ids[16:] = ids[:17].clone()  # something to learn
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": torch.ones(32),
            "position_ids": torch.arange(32),
        }


def begin_all(folder, parts):
    """Train each of *parts*, save it half way, and leave what it was and became in *folder*."""
    for part in parts:
        engine, store = _start(folder, part)
        _train(engine)
        before = gathered(engine)
        handle = engine.save(store)
        losses, rates = _train(engine)
        handle.result()
        store.close()
        if engine.layout.rank == 0:
            facts = {"whole": before, "losses": losses, "rates": rates}
            torch.save(facts, Path(folder, f"{part.name}.pt"))
        engine.close()


def go_on_all(folder, parts):
    """Load what *parts* name in the layout they have, and train on.

        Returns:
            For each a mapping: ``wrong`` keys of the state right after the load, on rank 0; ``keys``,
    how many there are; ``progress``, the counters; ``losses`` and ``rates`` of the steps after.
    """
    found = []
    for part in parts:
        engine, store = _start(folder, part)
        engine.progress.consumed_samples = 8 * STEPS
        (fresh,), _ = _train(engine, steps=1)
        engine.load(store)
        store.close()
        whole = gathered(engine)
        wrong, keys = [], 0
        progress = (engine.progress.step, engine.progress.consumed_samples)
        if engine.layout.rank == 0:
            saved = torch.load(Path(folder, f"{part.name}.pt"), weights_only=True)["whole"]
            wrong = sorted(saved.keys() ^ whole.keys())
            wrong += [k for k in saved if k in whole and not torch.equal(saved[k], whole[k])]
            keys = len(whole)
        losses, rates = _train(engine)
        engine.close()
        found.append(
            {
                "wrong": wrong,
                "keys": keys,
                "progress": progress,
                "losses": losses,
                "rates": rates,
                "fresh": fresh,
            }
        )
    return found


def _start(folder, part):
    overrides = (*BASE, *part.overrides, f"checkpoint.save={folder}/{part.name}")
    engine = Engine.from_config(tiny_config(*overrides))
    store, _ = checkpointers_of(engine.config, engine.layout)
    return engine, store


def _train(engine, *, steps=STEPS):
    """Train from the engine's data position on; return losses and learning rates."""
    sizes = BatchSizeSchedule.from_config(engine.config)
    data = batches(
        Text(),
        config=engine.config,
        layout=engine.layout,
        consumed_samples=engine.progress.consumed_samples,
        global_batch_size=sizes.global_batch_size,
    )
    losses, rates = [], []
    for _ in range(steps):
        count = sizes.num_microbatches(engine.progress.consumed_samples)
        terms = engine.forward_backward([next(data) for _ in range(count)])
        losses.append(float(terms.loss))
        outcome = engine.optimizer_step()
        rates.append((outcome.learning_rate, outcome.weight_decay))
    return losses, rates


def gathered(engine):
    """Return every parameter and optimizer state whole, put together by hand; on rank 0 alone.

    Raises:
        AssertionError: If ranks hold an element twice, or none holds it.
    """
    state = engine.state()
    mine = [
        (s.key, s.global_shape, s.offset, s.local_shape, s.flat_range, s.data.clone())
        for s in [*state["model"], *state["optimizer"]]
        if s.replica_id == 0
    ]
    size = torch.distributed.get_world_size()
    everybody = [None] * size if engine.layout.rank == 0 else None
    torch.distributed.gather_object(mine, everybody)
    wholes = {}
    for key, shape, offset, extent, flat, data in (p for own in everybody or () for p in own):
        whole = wholes.setdefault(key, torch.full(shape, math.nan, dtype=data.dtype))
        box = whole[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))]
        values = box.reshape(-1).clone()
        start, stop = flat or (0, values.numel())
        assert values[start:stop].isnan().all(), f"{key} is held twice"
        values[start:stop] = data.reshape(-1)
        box.copy_(values.view(extent))
    assert not any(t.isnan().any() for t in wholes.values()), "nobody holds a part"
    return wholes
