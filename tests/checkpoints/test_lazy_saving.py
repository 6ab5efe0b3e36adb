# SPDX-License-Identifier: Apache-2.0
"""The engine with lazily staged checkpoints: what is saved is the state before the next step."""

from __future__ import annotations

import time

import pytest
import torch
from mb_ckpt import CheckpointStore
from mb_ckpt.saving import stager
from mb_config.records import TensorShard
from mb_engine import Engine, pretrain
from mb_engine.testing import run_ranks, tiny_config

STEPS = 6
CASES = {
    "adam": [],
    "distributed optimizer, bf16": [
        "optimizer.use_distributed_optimizer=true",
        "ddp.overlap_grad_reduce=true",
        "ddp.overlap_param_gather=true",
        "mixed_precision=bf16_mixed",
    ],
    "experts with a bias that moves in the backward pass": [
        "model.num_moe_experts=4",
        "model.moe_router_topk=2",
        "model.moe_ffn_hidden_size=32",
        "model.moe_router_score_function=sigmoid",
        "model.moe_router_enable_expert_bias=true",
        "model.moe_router_load_balancing_type=none",
    ],
}


def batches(step):
    ids = torch.randint(0, 128, (8, 33), generator=torch.Generator().manual_seed(step))
    return [
        {
            "tokens": ids[row : row + 2, :-1].contiguous(),
            "labels": ids[row : row + 2, 1:].contiguous(),
            "loss_mask": torch.ones(2, 32),
            "position_ids": torch.arange(32).expand(2, -1),
        }
        for row in range(0, 8, 2)
    ]


def shards(state):
    return [s for part in state.values() for s in part if isinstance(s, TensorShard)]


def save_and_resume(folder, overrides):
    """Save at every step behind the next one; return what was wrong, and both runs' losses."""
    stage = stager.HostBuffer.stage

    def late(self, *args, **kwargs):
        time.sleep(0.05)  # so that a step that did not wait would change what is copied
        return stage(self, *args, **kwargs)

    stager.HostBuffer.stage = late
    config = tiny_config("model.num_layers=2", "model.hidden_dropout=0.1", *overrides)
    engine = Engine.from_config(config)
    store = CheckpointStore(folder, staging="lazy")
    expected, losses, buffers = {}, [], set()
    for step in range(STEPS):
        if step:
            expected[step] = {
                (s.key, s.offset, s.flat_range): s.data.clone() for s in shards(engine.state())
            }
            engine.save(store)
        losses.append(float(engine.forward_backward(batches(step)).loss))
        engine.optimizer_step()
    buffers = {name for chunk in engine.model for name, _ in chunk.named_buffers()}
    store.wait()
    wrong = []
    for step, tensors in expected.items():
        room = [s for s in shards(engine.state()) if s.data.fill_(0) is not None]
        store.load({"all": room}, step)
        wrong += [
            (step, s.key)
            for s in room
            if not torch.equal(s.data, tensors[s.key, s.offset, s.flat_range])
        ]
    engine.close()
    again = Engine.from_config(config)
    again.load(store, 3)
    resumed = []
    for step in range(3, STEPS):
        resumed.append(float(again.forward_backward(batches(step)).loss))
        again.optimizer_step()
    again.close()
    store.close()
    return {"wrong": wrong, "losses": losses[3:], "resumed": resumed, "buffers": sorted(buffers)}


def run_all(folder, cases):
    return [save_and_resume(f"{folder}/{i}", case) for i, case in enumerate(cases)]


def run_twice(folder):
    """Run to step 2, then on to step 4, in one process and one folder."""
    found = []
    for stop in (2, 4):
        config = tiny_config(
            "model.num_layers=1",
            "model.vocab_size=null",
            "train.train_iters=4",
            f"train.exit_interval={stop}",
            f"checkpoint.save={folder}",
            f"checkpoint.load={folder}",
            "logger.sinks=[]",
        )
        found.append(pretrain(config).failed_saves)
    return found


@pytest.mark.dist
def test_a_second_run_in_one_process_saves_where_the_first_did(tmp_path):
    assert run_ranks(run_twice, 1, str(tmp_path)) == [[0, 0]]
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [2, 4]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("lazy"))
    return dict(zip(CASES, run_ranks(run_all, 1, folder, list(CASES.values()))[0], strict=True))


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_each_save_holds_the_state_before_the_step_after_it(results, name):
    assert results[name]["wrong"] == []


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_from_a_lazy_save_is_the_run_itself(results, name):
    assert results[name]["resumed"] == results[name]["losses"]
    assert len(set(results[name]["losses"])) == STEPS - 3


@pytest.mark.dist
def test_the_experts_have_a_buffer_that_training_changes(results):
    case = results["experts with a bias that moves in the backward pass"]
    assert any(name.endswith("expert_bias") for name in case["buffers"])
