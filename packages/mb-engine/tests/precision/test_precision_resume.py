# SPDX-License-Identifier: Apache-2.0
"""A float16 run with a moving loss scale goes on from a checkpoint as if nothing had happened."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from mb_config.records import TensorShard
from mb_engine import Engine
from mb_engine.testing import run_ranks, tiny_config

STEPS = 10
FP16 = [
    "model.num_layers=2",
    "model.hidden_dropout=0.1",
    "mixed_precision=fp16_mixed",
    "train.train_iters=10",
    "optimizer.lr=1e-2",
    # 2^26 overflows at once, and the scale grows again after two good steps.
    "optimizer.initial_loss_scale=67108864",
    "optimizer.loss_scale_window=2",
    "optimizer.hysteresis=2",
]
GOOD = [*FP16, "optimizer.initial_loss_scale=16"]  # no step overflows
# name: overrides, step of the checkpoint, and what of the scaler is on its way there
CASES = {
    "one good step towards a larger scale": (GOOD, 3, {"growth_tracker": 1}),
    "one overflow towards a smaller scale": (FP16, 1, {"hysteresis_tracker": 1}),
    "distributed optimizer": (
        [*GOOD, "optimizer.use_distributed_optimizer=true"],
        3,
        {"growth_tracker": 1},
    ),
    "gradients reduced in float32": (
        [*GOOD, "mixed_precision.grad_reduce_in_fp32=true"],
        3,
        {"growth_tracker": 1},
    ),
}


class InMemory:
    """A checkpointer of one rank that stores what a file would: tensors and JSON."""

    def __init__(self):
        self.tensors, self.plain = {}, ""

    def save(self, state):
        self.tensors = {(s.key, s.offset, s.flat_range): s.data.clone() for s in self.shards(state)}
        self.plain = json.dumps({k: v for k, v in state.items() if k == "run"})

    def load(self, state, step=None):
        del step
        for shard in self.shards(state):
            shard.data.copy_(self.tensors[shard.key, shard.offset, shard.flat_range])
        return json.loads(self.plain)

    def shards(self, state):
        return [s for part in state.values() for s in part if isinstance(s, TensorShard)]


def batches(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 128, (8, 33), generator=generator)
    return [
        {
            "tokens": ids[row : row + 2, :-1].contiguous(),
            "labels": ids[row : row + 2, 1:].contiguous(),
            "loss_mask": torch.ones(2, 32),
            "position_ids": torch.arange(32).expand(2, -1),
        }
        for row in range(0, 8, 2)
    ]


def go_on(engine, first, last):
    seen = []
    for step in range(first, last):
        loss = float(engine.forward_backward(batches(step)).loss)
        done = engine.optimizer_step()
        seen.append((loss, done.updated, done.loss_scale, done.grad_norm))
    return seen


def resume(overrides, saved, _):
    """Return what an uninterrupted and an interrupted run saw, and the state of the scaler."""
    config = tiny_config(*overrides)
    store = InMemory()
    whole = Engine.from_config(copy.deepcopy(config))
    go_on(whole, 0, saved)
    store.save(whole.state())
    scaler = json.loads(store.plain)["run"]["optimizer"]["grad_scaler"]
    expected = go_on(whole, saved, STEPS)
    whole.close()
    second = Engine.from_config(config)
    second.load(store)
    seen = go_on(second, saved, STEPS)
    main = {p.dtype for group in second.optimizer.param_groups for p in group["params"]}
    reduced = {b.grad_dtype for chunk in second.chunks for b in chunk.buffers}
    second.close()
    return {"expected": expected, "seen": seen, "scaler": scaler, "main": main, "reduced": reduced}


def resume_all(cases):
    return [resume(*case) for case in cases]


@pytest.fixture(scope="module")
def results():
    return dict(zip(CASES, run_ranks(resume_all, 1, list(CASES.values()))[0], strict=True))


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(results, name):
    run = results[name]
    assert run["seen"] == run["expected"]
    scales = [scale for _, _, scale, _ in run["expected"]]
    assert len(set(scales)) > 1, f"the scale must have moved: {scales}"
    expected = CASES[name][2]
    assert {key: run["scaler"][key] for key in expected} == expected


@pytest.mark.dist
def test_main_parameters_and_reductions_have_the_precision_asked_for(results):
    assert results["one good step towards a larger scale"]["main"] == {torch.float32}
    assert results["distributed optimizer"]["main"] == {torch.float32}
    assert results["one good step towards a larger scale"]["reduced"] == {torch.float16}
    assert results["gradients reduced in float32"]["reduced"] == {torch.float32}
