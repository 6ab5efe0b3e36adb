# SPDX-License-Identifier: Apache-2.0
"""Gradients in their buffer, and their norm and clipping there, against megatron-core's own way."""

from __future__ import annotations

import pytest
import torch
from mb_engine.testing import run_ranks, tiny_config

pytestmark = pytest.mark.dist

STEPS = 3


def both_ways(cases):
    """Return what this rank found in each case: the short way, then megatron-core's own."""
    # The first engine prepares megatron-core, on which these imports rest.
    short = [train(overrides) for overrides in cases]
    from mb_engine.parallel import gradient_buffer, wrap
    from mb_engine.train import clipping
    from megatron.core.distributed import DistributedDataParallel

    gradient_buffer.BufferedDataParallel = DistributedDataParallel
    wrap._is_data_parallel = lambda _config: False
    clipping.use_buffers = lambda optimizer, _chunks: optimizer
    return list(zip(short, [train(overrides) for overrides in cases], strict=True))


def train(overrides):
    """Train two micro-batches a step; return losses, norms, parameters and what was used."""
    from mb_engine import Engine

    config = tiny_config(
        "model.num_layers=1",
        "train.global_batch_size=4",
        "optimizer.clip_grad=0.3",
        "optimizer.adam_eps=1e-4",
        "scheduler.lr_decay_style=constant",
        *overrides,
    )
    engine = Engine.from_config(config)
    generator = torch.Generator().manual_seed(3)
    losses, norms, zeros = [], [], []
    for _ in range(STEPS):
        ids = torch.randint(0, 128, (4, 33), generator=generator)
        rank, count = engine.layout.dp_rank, 2 // engine.layout.dp
        batches = [
            {
                "tokens": ids[row : row + 2, :-1],
                "labels": ids[row : row + 2, 1:],
                "loss_mask": torch.ones(2, 32),
                "position_ids": torch.arange(32).expand(2, -1),
            }
            for row in range(2 * rank * count, 2 * (rank + 1) * count, 2)
        ]
        losses.append(engine.forward_backward(batches).loss.item())
        in_place = all(p.grad is p.main_grad for c in engine.chunks for p in c.params_with_grad)
        outcome = engine.optimizer_step()
        norms.append(outcome.grad_norm)
        zeros.append(outcome.num_zeros)
    with engine.synced_parameters():
        parameters = {
            n: p.detach().float().numpy().copy()
            for m in engine.model
            for n, p in m.named_parameters()
        }
    used = type(engine.chunks[0]).__name__, type(engine.optimizer).__name__, in_place
    engine.close()
    return losses, norms, zeros, parameters, used


CASES = {
    "one rank": (1, [], ("BufferedOptimizer", True)),
    "zeros counted": (1, ["optimizer.log_num_zeros_in_grad=true"], ("BufferedOptimizer", True)),
    "not clipped": (1, ["optimizer.clip_grad=0"], ("BufferedOptimizer", True)),
    "SGD": (1, ["optimizer.optimizer=sgd"], ("BufferedOptimizer", True)),
    "gradients checked": (1, ["ddp.check_for_nan_in_grad=true"], ("BufferedOptimizer", True)),
    "bfloat16": (1, ["mixed_precision=bf16_mixed"], ("ChainedOptimizer", False)),
    "DP2": (2, [], ("BufferedOptimizer", True)),
    "DP2 with overlap": (2, ["ddp.overlap_grad_reduce=true"], ("BufferedOptimizer", False)),
    "DP2, sharded": (
        2,
        ["optimizer.use_distributed_optimizer=true"],
        ("ChainedOptimizer", True),
    ),
    "TP2": (2, ["model.tensor_model_parallel_size=2"], ("ChainedOptimizer", True)),
}


@pytest.fixture(scope="module")
def results():
    """Return name -> one (short, own) a rank."""
    found = {}
    for ranks in (1, 2):
        names = [name for name, (count, *_) in CASES.items() if count == ranks]
        by_rank = run_ranks(both_ways, ranks, [CASES[name][1] for name in names], timeout_s=240)
        found |= dict(zip(names, zip(*by_rank, strict=True), strict=True))
    return found


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_megatrons_own_way(name, results):
    *_, expected_use = CASES[name]
    for (losses, norms, zeros, parameters, used), (l_, n_, z_, p_, theirs) in results[name]:
        assert used == ("BufferedDataParallel", *expected_use)
        assert theirs == ("DistributedDataParallel", "ChainedOptimizer", False)
        assert losses == pytest.approx(l_, abs=2e-6)
        assert losses[0] != losses[-1]
        assert norms == pytest.approx(n_, rel=2e-6)
        assert norms[0] > 0.3
        assert zeros == z_
        for key, values in p_.items():
            assert abs(parameters[key] - values).max() < 2e-6, key


def adds_up_after_gradients_were_dropped():
    from mb_engine import Engine

    engine = Engine.from_config(tiny_config("model.num_layers=1"))
    ids = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(3))
    (chunk,) = engine.chunks

    def backward():
        chunk(ids[:, :-1], None, None, labels=ids[:, 1:]).sum().backward()
        return chunk.buffers[0].grad_data.clone()

    chunk.zero_grad_buffer()
    once = backward()
    twice = backward()
    chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    dropped_once = backward()
    engine.optimizer.zero_grad()
    dropped_twice = backward()
    engine.close()
    return [x.numpy().copy() for x in (once, twice, dropped_once, dropped_twice)]


def test_a_gradient_set_to_none_is_added_to_the_buffer_all_the_same():
    ((once, twice, dropped_once, dropped_twice),) = run_ranks(
        adds_up_after_gradients_were_dropped, 1
    )
    assert abs(once).max() > 1e-2
    assert abs(twice - 2 * once).max() < 1e-5
    assert (dropped_once == once).all()
    assert abs(dropped_twice - 2 * once).max() < 1e-5


WRITE_THEMSELVES = {
    "gradient_accumulation_fusion": True,
    "transformer_impl": "transformer_engine",
    "cuda_graph_impl": "local",
}


def gradients_before_backward():
    """Return whether gradients are in place before a backward pass, as is and with each of them."""
    from mb_engine.model.gpt import build_model
    from mb_engine.parallel.wrap import wrap_data_parallel
    from mb_engine.runtime.distributed import initialize, shutdown
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config("model.num_layers=1").finalize(1)
    layout = initialize(config)
    seed_everything(config.rng, layout)
    found = {}
    for name, value in {"nothing": None, **WRITE_THEMSELVES}.items():
        (model,) = build_model(config, layout)
        setattr(model.config, name, value)
        (chunk,) = wrap_data_parallel(config, [model])
        chunk.zero_grad_buffer()
        found[name] = {p.grad is not None for p in chunk.params_with_grad}
    shutdown()
    return found


def test_who_writes_gradients_into_the_buffer_himself_is_left_alone():
    (found,) = run_ranks(gradients_before_backward, 1)
    assert found == {"nothing": {True}, **{key: {False} for key in WRITE_THEMSELVES}}


def norms_and_exact(sizes):
    """Return for each size the norm of two buffers and what float64 makes of it."""
    from mb_engine.train.clipping import norm_of

    found = []
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        buffers = [torch.randn(n, generator=generator) for n in (size, 7)]
        exact = torch.linalg.vector_norm(torch.cat(buffers).double())
        found.append((norm_of(buffers).item(), exact.item()))
    return found


def test_the_norm_of_long_buffers_is_exact_to_float32():
    (found,) = run_ranks(norms_and_exact, 1, [1, (1 << 16) + 1, 3_000_001])
    for norm, exact in found:
        assert norm == pytest.approx(exact, rel=1e-6)
