# SPDX-License-Identifier: Apache-2.0
"""Random states: restored exactly, equal where replicated, different where split."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from mb_engine.testing import run_ranks, tiny_config
from torch.nn import functional

TP = "model.tensor_model_parallel_size=2"


def start(*overrides):
    from mb_engine.runtime.distributed import initialize, world_size_from_environment
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config(*overrides).finalize(world_size_from_environment())
    layout = initialize(config)
    seed_everything(config.rng, layout)
    return config, layout


@pytest.fixture
def one_rank():
    from mb_engine.runtime.distributed import shutdown

    yield start()
    shutdown()


def draw_all():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    drawn = [
        random.random(),
        random.gauss(),
        np.random.rand(),  # noqa: NPY002 - the global generator is the one kept
        np.random.standard_normal(),  # noqa: NPY002
        torch.rand(3).tolist(),
    ]
    for name in sorted(get_cuda_rng_tracker().get_states()):
        with get_cuda_rng_tracker().fork(name):
            drawn.append(torch.rand(3).tolist())
    return drawn


def test_every_generator_goes_on_from_a_restored_state(one_rank):
    from mb_engine.runtime.seeding import rng_state, set_rng_state

    draw_all()  # leaves one Gaussian over in python and in numpy
    saved = rng_state()
    first = draw_all()
    second = draw_all()
    assert len(first) == 8
    assert all(a != b for a, b in zip(first, second, strict=True))
    set_rng_state(saved)
    assert draw_all() == first
    assert draw_all() == second


def test_states_are_integer_tensors_that_a_checkpoint_can_fill_in_place(one_rank):
    from mb_engine.runtime.seeding import rng_state, set_rng_state

    saved = {name: tensor.clone() for name, tensor in rng_state().items()}
    assert {t.dtype for t in saved.values()} == {torch.int64, torch.uint8}
    assert {"python", "numpy", "torch", "megatron.model-parallel-rng"} <= set(saved)
    first = draw_all()
    into = rng_state()
    for name, tensor in into.items():
        tensor.copy_(saved[name])
    set_rng_state(into)
    assert draw_all() == first
    for tensor in into.values():
        tensor.zero_()  # what was given is a copy
    assert rng_state()["megatron.model-parallel-rng"].any()


def test_a_state_is_a_copy_of_what_was(one_rank):
    from mb_engine.runtime.seeding import rng_state

    saved = rng_state()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    draw_all()
    for name, tensor in saved.items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(tensor, rng_state()[name])


def test_the_same_seed_starts_the_same_numbers(one_rank):
    from mb_engine.runtime.seeding import seed_everything

    config, layout = one_rank
    seed_everything(config.rng, layout)
    first = draw_all()
    seed_everything(config.rng, layout)
    assert draw_all() == first


def draws_of_rank(overrides):
    from mb_engine.runtime.distributed import shutdown

    start(*overrides)
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    default = torch.rand(4).tolist()
    with get_cuda_rng_tracker().fork():
        split = torch.rand(4).tolist()
    shutdown()
    return default, split


def dropouts_of_rank(overrides):
    """Return this rank's attention output and its residual branch, with dropout on."""
    from mb_engine.model.attention import TorchAttention
    from mb_engine.model.gpt import build_model, transformer_config
    from mb_engine.runtime.distributed import shutdown
    from megatron.core.transformer.enums import AttnMaskType

    config, layout = start(
        TP, "model.attention_dropout=0.5", "model.hidden_dropout=0.5", *overrides
    )
    core = TorchAttention(transformer_config(config), 1, AttnMaskType.causal, "self")
    # The same queries, keys and values on both ranks: only the masks can differ.
    x = torch.randn(8, 1, 2, 16, generator=torch.Generator().manual_seed(3))
    kv = x[:, :, :1]
    attended = core(x, kv, kv)
    (model,) = build_model(config, layout)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    embedded = model.embedding(tokens, torch.arange(32)[None])
    model.eval()
    with torch.no_grad():
        full = model.embedding(tokens, torch.arange(32)[None])
    shutdown()
    return attended, embedded == 0, full


PP = "model.pipeline_model_parallel_size=2"
DP_INIT = "rng.data_parallel_random_init=true"
SP = "model.sequence_parallel=true"


def all_of_rank():
    draws = {name: draws_of_rank([name]) for name in (TP, PP, DP_INIT)}
    draws["DP"] = draws_of_rank([])
    return draws, {name: dropouts_of_rank(list(name)) for name in ((), (SP,))}


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(all_of_rank, 2, timeout_s=240)


@pytest.mark.dist
def test_tensor_parallel_ranks_share_one_state_and_differ_in_the_other(two_ranks):
    a, b = (draws[TP] for draws, _ in two_ranks)
    assert a[0] == b[0]
    assert a[1] != b[1]


@pytest.mark.dist
def test_pipeline_stages_differ_and_data_parallel_ranks_agree_unless_told(two_ranks):
    a, b = (draws[PP] for draws, _ in two_ranks)
    assert a[0] != b[0]
    a, b = (draws["DP"] for draws, _ in two_ranks)
    assert a == b
    a, b = (draws[DP_INIT] for draws, _ in two_ranks)
    assert a[0] != b[0]


@pytest.mark.dist
def test_dropout_masks_of_heads_differ_and_of_the_replicated_residual_agree(two_ranks):
    (attended_a, dropped_a, full), (attended_b, dropped_b, _) = (d[()] for _, d in two_ranks)
    assert not torch.equal(attended_a, attended_b)
    assert torch.equal(dropped_a, dropped_b)
    assert dropped_a.float().mean() == pytest.approx(0.5, abs=0.1)
    assert (full != 0).all()


@pytest.mark.dist
def test_dropout_masks_differ_where_ranks_have_other_tokens(two_ranks):
    (_, dropped_a, _), (_, dropped_b, _) = (d[SP,] for _, d in two_ranks)
    assert dropped_a.shape[0] == 16
    assert not torch.equal(dropped_a, dropped_b)


def test_attention_dropout_keeps_the_mean(one_rank):
    """The oracle: many masks on the same input average to the output without dropout."""
    from mb_engine.model.attention import TorchAttention
    from mb_engine.model.gpt import transformer_config
    from megatron.core.transformer.enums import AttnMaskType

    config = tiny_config("model.attention_dropout=0.3").finalize(1)
    core = TorchAttention(transformer_config(config), 1, AttnMaskType.causal, "self")
    x = torch.randn(6, 1, 4, 16, generator=torch.Generator().manual_seed(1))
    mean = torch.stack([core(x, x, x) for _ in range(1500)]).mean(0)
    core.eval()
    assert functional.mse_loss(mean, core(x, x, x)) < 2e-3
