# SPDX-License-Identifier: Apache-2.0
"""Megatron-FSDP's state is that of plain data parallelism, and each continues the other's run."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from mb_engine import Engine
from mb_engine.errors import EngineError
from mb_engine.testing import run_ranks, tiny_config

FSDP = "ddp.use_megatron_fsdp=true"
PLAIN = ("optimizer.use_distributed_optimizer=true",)
OPTIM, GRADS, PARAMS = (
    (FSDP, f"ddp.data_parallel_sharding_strategy={name}")
    for name in ("optim", "optim_grads", "optim_grads_params")
)
BF16 = ("mixed_precision=bf16_mixed",)
MOE = ("model.num_moe_experts=4", "model.moe_router_dtype=fp32")
# What starts a run and what continues it.
PAIRS = {
    "plain to optim": (PLAIN, OPTIM),
    "plain to optim_grads": (PLAIN, GRADS),
    "plain to optim_grads_params": (PLAIN, PARAMS),
    "optim_grads_params to plain": (PARAMS, PLAIN),
    "bf16, plain to optim_grads_params": ((*PLAIN, *BF16), (*PARAMS, *BF16)),
    "bf16, optim_grads to plain": ((*GRADS, *BF16), (*PLAIN, *BF16)),
    "experts, optim_grads_params to plain": ((*PARAMS, *MOE), (*PLAIN, *MOE)),
}


class Memory:
    """A checkpoint of all ranks, held as whole tensors."""

    def __init__(self, engine):
        state = engine.state()
        self.run = state["run"]
        self.whole = {}
        mine = [
            (s.key, s.global_shape, s.offset, s.local_shape, s.flat_range, s.data.clone())
            for s in [*state["model"], *state["optimizer"]]
            if s.replica_id == 0
        ]
        everybody = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everybody, mine)
        for key, shape, offset, extent, flat, data in (p for own in everybody for p in own):
            whole = self.whole.setdefault(key, torch.full(shape, math.nan, dtype=data.dtype))
            box = box_of(whole, offset, extent)
            values = box.reshape(-1).clone()
            start, stop = flat or (0, values.numel())
            assert values[start:stop].isnan().all(), f"{key} was written twice"
            values[start:stop] = data.reshape(-1)
            box.copy_(values.view(extent))
        assert not any(t.isnan().any() for t in self.whole.values()), "nobody wrote a part"

    def load(self, state, step=None):
        for shard in [*state.get("model", []), *state.get("optimizer", [])]:
            whole = self.whole[shard.key]
            values = box_of(whole, shard.offset, shard.local_shape).reshape(-1)
            start, stop = shard.flat_range or (0, values.numel())
            assert whole.dtype == shard.data.dtype
            shard.data.copy_(values[start:stop].view_as(shard.data))
        return {"run": self.run}


def box_of(whole, offset, extent):
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))]


def engine_of(overrides):
    return Engine.from_config(
        tiny_config(
            "model.num_layers=2",
            "train.train_iters=6",
            "optimizer.lr=3e-3",
            "optimizer.adam_eps=1e-5",
            "scheduler.lr_decay_style=constant",
            "checkpoint.save_rng=false",
            *overrides,
        )
    )


def micro_batches(engine):
    ids = torch.randint(0, 128, (4, 2, 33), generator=torch.Generator().manual_seed(4))
    return [
        {
            "tokens": x[:, :-1].contiguous(),
            "labels": x[:, 1:].contiguous(),
            "loss_mask": torch.ones(2, 32),
            "position_ids": torch.arange(32).expand(2, -1),
        }
        for x in ids[engine.layout.dp_rank :: engine.layout.dp]
    ]


def steps(engine, count):
    losses = []
    for _ in range(count):
        losses.append(float(engine.forward_backward(micro_batches(engine)).loss))
        engine.optimizer_step()
    return losses


def evaluate(engine):
    return float(engine.evaluate([micro_batches(engine)]).loss)


def hand_over(pairs):
    return [hand_over_one(*pair) for pair in pairs]


def hand_over_one(first, second):
    engine = engine_of(first)
    steps(engine, 3)
    saved = Memory(engine)
    expected = steps(engine, 3)
    at_end = Memory(engine).whole
    norm = engine.parameters_norm()
    engine.close()

    engine = engine_of(second)
    fresh = steps(engine, 1)
    engine.load(saved)
    loaded = Memory(engine).whole
    evaluated = evaluate(engine)
    found = steps(engine, 3)
    result = {
        "expected": expected,
        "found": found,
        "fresh": fresh,
        "evaluated": evaluated,
        "saved": saved.whole,
        "loaded": loaded,
        "at_end": (at_end, Memory(engine).whole),
        "norms": (norm, engine.parameters_norm()),
        "steps": engine.progress.step,
        "owned": sum(s.data.numel() for s in engine.model_shards()),
    }
    engine.load(saved, weights_only=True)
    result["weights only"] = evaluate(engine)
    steps(engine, 1)  # main parameters follow the loaded ones, or it would jump back
    result["after weights only"] = evaluate(engine)
    engine.close()
    return result


@pytest.fixture(scope="module")
def handed_over():
    by_rank = run_ranks(hand_over, 2, list(PAIRS.values()), timeout_s=280)
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(PAIRS)}


@pytest.mark.dist
@pytest.mark.parametrize("name", PAIRS)
def test_a_run_goes_on_as_if_nothing_had_changed(name, handed_over):
    # Both sides have the same float32 main parameters; a bf16 activation has 8 bits.
    tolerance = 2e-2 if "bf16" in name else 1e-5
    for seen in handed_over[name]:
        assert seen["found"] == pytest.approx(seen["expected"], abs=tolerance)
        assert abs(seen["fresh"][0] - seen["expected"][0]) > 0.1, "the load must have mattered"
        assert seen["evaluated"] == pytest.approx(seen["expected"][0], abs=tolerance)
        assert seen["weights only"] == seen["evaluated"]
        assert seen["after weights only"] < seen["weights only"]
        assert seen["norms"][0] == pytest.approx(seen["norms"][1], rel=1e-4)
        assert seen["steps"] == 6


@pytest.mark.dist
@pytest.mark.parametrize("name", PAIRS)
def test_what_is_loaded_is_what_was_saved(name, handed_over):
    seen = handed_over[name][0]
    assert set(seen["loaded"]) == set(seen["saved"])
    for key, tensor in seen["saved"].items():
        assert torch.equal(seen["loaded"][key], tensor), key
    moments = [key for key in seen["saved"] if "exp_avg_sq" in key]
    assert len(moments) >= 10
    assert all(seen["saved"][key].max() > 0 for key in moments)
    if "bf16" not in name:
        one, other = seen["at_end"]
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.dist
def test_each_rank_owns_half_of_the_parameters(handed_over):
    owned = [seen["owned"] for seen in handed_over["plain to optim_grads_params"]]
    whole = sum(
        tensor.numel()
        for key, tensor in handed_over["plain to optim_grads_params"][0]["saved"].items()
        if key.startswith("model.")
    )
    assert sum(owned) == whole
    assert max(owned) < 0.6 * whole


def without_einops():
    sys.modules["einops"] = None
    try:
        engine_of((FSDP,))
    except EngineError as error:
        return str(error)
    return "no error"


@pytest.mark.dist
def test_says_what_to_install_where_einops_is_missing():
    for message in run_ranks(without_einops, 2, fresh=True):
        assert message == (
            'ddp.use_megatron_fsdp=True needs einops; pip install "mb-engine[fsdp]", or set it to'
            " false"
        )
