# SPDX-License-Identifier: Apache-2.0
"""A sharded state dict of megatron-core goes into mb-ckpt as it is, and comes back in place."""

from __future__ import annotations

import copy
import io
import random

import numpy as np
import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore
from mb_engine import Engine
from mb_engine.testing import run_ranks, tiny_config

TP2 = ["model.tensor_model_parallel_size=2"]


def tensors(model):
    return {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def save_model(folder, overrides):
    """Save a gated-MLP model; return this rank's parameters of the replicated kind."""
    engine = Engine.from_config(tiny_config("model.num_layers=2", *overrides))
    (model,) = engine.model
    state = {"model": model.sharded_state_dict(), "n": 3}
    with CheckpointStore(folder) as store:
        store.save(1, state).result()
        stored = store.inspect().tensors
    before = copy.deepcopy(tensors(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1)
    with CheckpointStore(folder) as store:
        assert store.load({"model": model.sharded_state_dict()})["n"] == 3
    after = tensors(model)
    same = all(torch.equal(before[k], after[k]) for k in before)
    engine.close()
    return same, len(before), sorted(stored)


def load_model(folder, overrides):
    """Load what other ranks saved; return all parameters."""
    engine = Engine.from_config(tiny_config("model.num_layers=2", *overrides))
    (model,) = engine.model
    with CheckpointStore(folder) as store:
        store.load({"model": model.sharded_state_dict()})
    found = copy.deepcopy(tensors(model))
    engine.close()
    return found


@pytest.mark.dist
def test_two_tensor_parallel_ranks_save_and_one_rank_loads(tmp_path):
    saved = run_ranks(save_model, 2, str(tmp_path), TP2)
    assert all(same for same, _, _ in saved)
    assert all(count > 10 for _, count, _ in saved)
    (whole,) = run_ranks(load_model, 1, str(tmp_path), [])
    halves = run_ranks(load_model, 2, str(tmp_path), TP2)
    name = next(k for k in whole if k.endswith("layers.0.mlp.linear_fc1.weight"))
    # Gate and up halves of the fused projection are split over ranks one by one.
    gate, up = zip(*(half[name].chunk(2) for half in halves), strict=True)
    assert torch.equal(whole[name], torch.cat([*gate, *up]))
    name = next(k for k in whole if k.endswith("layers.0.self_attention.linear_proj.weight"))
    assert torch.equal(whole[name], torch.cat([half[name] for half in halves], dim=1))


@pytest.mark.dist
def test_objects_are_stored_as_plain_data_and_given_back(tmp_path):
    mapping = pytest.importorskip("megatron.core.dist_checkpointing.mapping")

    def state(fill):
        values = [{"scale": (1, 2.5)}, io.BytesIO(b"some bytes"), None]
        return {
            f"o{i}": mapping.ShardedObject("extra", value if fill else None, (4,), (i,))
            for i, value in enumerate(values)
        } | {
            "copy": mapping.ShardedObject("extra", "another", (4,), (0,), replica_id=(0, 1)),
            "local": mapping.LocalNonpersistentObject([print]),
        }

    room = state(fill=False)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state(fill=True)).result()
        assert sorted(store.inspect().tensors) == [f"extra/shard_{i}_4" for i in range(3)]
        store.load(room)
        assert room["o0"].data == {"scale": (1, 2.5)}
        assert room["o1"].data.getvalue() == b"some bytes"
        assert room["o2"].data is None
        assert room["copy"].data == {"scale": (1, 2.5)}
        more = {"x": mapping.ShardedObject("lost", None, (1,), (0,))}
        with pytest.raises(CheckpointError, match="lacks lost/shard_0_1"):
            store.load(more)
        assert store.load(more, missing="ignore").missing == ("lost/shard_0_1",)
        bad = {"x": mapping.ShardedObject("bad", {"f": print}, (1,), (0,))}
        with pytest.raises(CheckpointError, match=r"'bad/shard_0_1\.f' is a builtin"):
            store.save(2, bad)


def test_random_states_as_megatron_gathers_them_come_back(tmp_path):
    mapping = pytest.importorskip("megatron.core.dist_checkpointing.mapping")
    states = [{
        "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),  # noqa: NPY002
        "torch_rng_state": torch.get_rng_state(), "more": torch.tensor([1.5], dtype=torch.bfloat16),
        "nothing": torch.empty(0, 2), "count": np.int64(3),
    }]  # fmt: skip
    room = mapping.ShardedObject("rng_state", None, (1, 1), (0, 0))
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"rng": mapping.ShardedObject("rng_state", states, (1, 1), (0, 0))})
        store.load({"rng": room}, 1)
    (found,) = room.data
    random.setstate(found["random_rng_state"])
    np.random.set_state(found["np_rng_state"])  # noqa: NPY002
    torch.set_rng_state(found["torch_rng_state"])
    assert found["random_rng_state"] == states[0]["random_rng_state"]
    assert (found["np_rng_state"][1] == states[0]["np_rng_state"][1]).all()
    assert found["np_rng_state"][1].dtype == np.uint32
    assert torch.equal(found["torch_rng_state"], states[0]["torch_rng_state"])
    assert torch.equal(found["more"], states[0]["more"])
    assert found["nothing"].shape == (0, 2)
    assert found["count"] == 3
