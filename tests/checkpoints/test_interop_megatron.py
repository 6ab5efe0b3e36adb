# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's own checkpoints come in and go out, against ``dist_checkpointing`` itself."""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore, export_checkpoint, import_checkpoint
from mb_engine import Engine
from mb_engine.testing import run_ranks, tiny_config
from torch import distributed as dist

SIZES = [
    "model.num_layers=2", "train.micro_batch_size=1", "train.global_batch_size=4",
    "optimizer.use_distributed_optimizer=true",
]  # fmt: skip
TP2 = ["model.tensor_model_parallel_size=2"]
PP2 = ["model.pipeline_model_parallel_size=2"]
OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable"}


def build(overrides, seed):
    """Return an engine whose parameters and moments are random, another for each seed."""
    engine = Engine.from_config(tiny_config(*SIZES, *overrides))
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    engine.optimizer.step()  # makes the moments
    with torch.no_grad():
        for parameter in engine.model[0].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        engine.optimizer.reload_model_params()
        for one in engine.optimizer.chained_optimizers:
            for state in one.optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name].copy_(torch.rand(state[name].shape, generator=generator))
    return engine


def sharded(engine, *, loading=False):
    model = engine.model[0].sharded_state_dict()
    optimizer = engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=OPTIMIZER)
    return {"model": model, "optimizer": optimizer}


def tensors(value, path=""):
    """Return the tensors of a nested state by path; of sharded tensors, what they hold."""
    value = getattr(value, "data", value) if type(value).__name__ == "ShardedTensor" else value
    if torch.is_tensor(value):
        return {path: value.detach().clone()}
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, (list, tuple)):
        value = enumerate(value)
    else:
        return {}
    return {k: v for name, item in value for k, v in tensors(item, f"{path}/{name}").items()}


def save_with_megatron(folder, overrides):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import mapping

    multiprocessing.current_process()._config["daemon"] = False  # it writes in a process of its own
    engine = build(overrides, 1)
    state = {
        **sharded(engine), "iteration": 7, "checkpoint_version": 3.0,
        "args": argparse.Namespace(lr=0.1, params_dtype=torch.float32),
        "rng": mapping.ShardedObject(
            "rng_state", [{"torch": torch.arange(5, dtype=torch.uint8), "numpy": np.arange(3)}],
            (1,), (0,), replica_id=dist.get_rank(),
        ),
    }  # fmt: skip
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    dist_checkpointing.save(state, folder, ("torch_dist", 1))
    engine.close()


def load_with_megatron(folder, overrides):
    """Return what Megatron loads, and whether all of it differs from what was there."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import mapping

    engine = build(overrides, 2)
    rng = mapping.ShardedObject("rng_state", None, (1,), (0,), replica_id=dist.get_rank())
    state = {**sharded(engine, loading=True), "rng": rng}
    before = tensors(state["model"])
    loaded = dist_checkpointing.load(state, folder)
    assert loaded["rng"][0]["numpy"].tolist() == [0, 1, 2]
    found = tensors(loaded)
    changed = all(not torch.equal(found[f"/model{k}"], v) for k, v in before.items())
    engine.close()
    return found, changed


def load_model_from_store(folder, overrides):
    from megatron.core.dist_checkpointing import mapping

    engine = build(overrides, 3)
    rng = mapping.ShardedObject("rng_state", None, (1,), (0,))
    state = {"model": engine.model[0].sharded_state_dict()}
    with CheckpointStore(folder) as store:
        store.load({**state, "rng": rng}, 7)
    assert rng.data[0]["torch"].tolist() == list(range(5))
    assert rng.data[0]["numpy"].tolist() == list(range(3))
    found = tensors({"model": engine.model[0].state_dict()})
    engine.close()
    return found


def same(one, other, keys):
    return all(torch.equal(one[k], other[k]) for k in keys)


def weights(found):
    return [key for key in found if key.startswith("/model/")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that two ranks of Megatron wrote, imported into a store."""
    root = tmp_path_factory.mktemp("megatron")
    run_ranks(save_with_megatron, 2, str(root / "iter_0000007"), TP2)
    with CheckpointStore(root / "store") as store:
        done = import_checkpoint(root, store)
    return root, done


@pytest.mark.dist
def test_a_checkpoint_of_megatron_is_imported_whole(saved):
    root, done = saved
    assert (done.step, done.format, done.left_out) == (7, "torch_dist", ())
    with CheckpointStore(root / "store") as store:
        info = store.inspect()
        store.verify()
    assert info.tensors["decoder.layers.mlp.linear_fc1.weight"].shape == (2, 256, 64)
    assert info.tensors["optimizer.state.exp_avg.output_layer.weight"].shape == (128, 64)
    assert "decoder.layers.mlp.linear_fc1._extra_state/shard_1_2" in info.tensors
    assert info.plain["args"] == {"lr": 0.1, "params_dtype": "torch.float32"}
    assert info.plain["iteration"] == 7


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "overrides"), [(1, []), (2, TP2), (2, PP2)])
def test_a_sharded_state_dict_is_filled_as_megatron_fills_it(saved, ranks, overrides):
    root, _ = saved
    expected = run_ranks(load_with_megatron, ranks, str(root / "iter_0000007"), overrides)
    found = run_ranks(load_model_from_store, ranks, str(root / "store"), overrides)
    for (there, changed), here in zip(expected, found, strict=True):
        assert changed
        assert weights(there)
        assert same(there, here, weights(there))


@pytest.mark.dist
def test_what_is_exported_is_loaded_by_megatron_in_another_layout(saved, tmp_path):
    """Weights and optimizer: out of the store again, bit for bit what Megatron wrote."""
    root, _ = saved
    with CheckpointStore(root / "store") as store:
        export_checkpoint(store, tmp_path / "out", to="torch_dist")
    for ranks, overrides in ((1, []), (2, PP2)):
        first = run_ranks(load_with_megatron, ranks, str(root / "iter_0000007"), overrides)
        again = run_ranks(load_with_megatron, ranks, str(tmp_path / "out"), overrides)
        for (there, _), (here, changed) in zip(first, again, strict=True):
            assert changed
            assert same(there, here, there)


def load_into_engine(folder, overrides):
    """Fill mb-engine's own model state: a layer a key, and ``model.`` before it."""
    engine = build(overrides, 4)
    with CheckpointStore(folder) as store:
        store.load({"model": engine.state()["model"]}, 7)
    found = tensors({"model": engine.model[0].state_dict()})
    engine.close()
    return found


@pytest.mark.dist
def test_the_engine_loads_weights_that_were_imported_under_its_keys(saved, tmp_path):
    root, _ = saved
    with CheckpointStore(tmp_path / "store") as store:
        import_checkpoint(root, store, split_layers=True, add_prefix="model.")
        stored = store.inspect().tensors
    assert stored["model.decoder.layers.1.mlp.linear_fc1.weight"].shape == (256, 64)
    assert "model.decoder.layers.1.mlp.linear_fc1._extra_state/shard_0_1" in stored
    for ranks, overrides in ((2, TP2), (2, PP2)):
        expected = run_ranks(load_with_megatron, ranks, str(root / "iter_0000007"), overrides)
        found = run_ranks(load_into_engine, ranks, str(tmp_path / "store"), overrides)
        for (there, _), here in zip(expected, found, strict=True):
            assert same(there, here, weights(there))


def test_layers_are_split_only_where_they_are_stacked(saved, tmp_path):
    root, _ = saved
    with CheckpointStore(tmp_path / "store") as store:
        import_checkpoint(root, store, split_layers=True)
        export_checkpoint(store, tmp_path / "out", to="torch_dist")
        with pytest.raises(CheckpointError, match="holds stacked layers"):
            import_checkpoint(tmp_path / "out", store, split_layers=True, step=8)


def take_through_a_store(root):
    """Save buckets of one layout with Megatron, import and export them, and load both."""
    from megatron.core import dist_checkpointing

    multiprocessing.current_process()._config["daemon"] = False
    root = Path(root)

    def state(engine, **options):
        model = engine.model[0].sharded_state_dict()
        kind = {"distrib_optim_sharding_type": "dp_reshardable"}
        optimizer = engine.optimizer.sharded_state_dict(model, metadata=kind, **options)
        return {"optimizer": optimizer}

    (root / "first").mkdir()
    engine = build([], 1)
    dist_checkpointing.save({**state(engine), "iteration": 3}, str(root / "first"))
    with CheckpointStore(root / "store") as store:
        import_checkpoint(root / "first", store)
        export_checkpoint(store, root / "second", to="torch_dist")
    return [
        tensors(dist_checkpointing.load(state(engine, is_loading=True), str(root / name)))
        for name in ("first", "second")
    ]


@pytest.mark.dist
def test_buckets_of_one_layout_are_handed_on_as_they_are(tmp_path):
    ((first, second),) = run_ranks(take_through_a_store, 1, str(tmp_path))
    assert len(first) > 2
    assert first.keys() == second.keys()
    assert same(first, second, first)
