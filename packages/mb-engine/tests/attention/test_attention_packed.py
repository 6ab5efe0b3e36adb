# SPDX-License-Identifier: Apache-2.0
"""Packed rows train as their samples do one by one, in every layout, and nothing leaks.

Tolerances: losses and gradients differ from those of single samples by the order of float32
additions, which costs a few roundings (6e-8 relative): 1e-5 for losses near 5 over some steps.
"""

from __future__ import annotations

import pytest
import torch
from mb_engine import Engine
from mb_engine.errors import EngineError
from mb_engine.testing import run_ranks, tiny_config

pytestmark = pytest.mark.dist

LENGTHS = [[8, 4, 20], [16, 16]]
"""Of the samples of two micro-batches of 32 tokens; multiples of 4, which is 2 x CP2."""
STEPS = 4
TP = "model.tensor_model_parallel_size=2"
SP = "model.sequence_parallel=true"
PP = "model.pipeline_model_parallel_size=2"
CP = "model.context_parallel_size=2"

LAYOUTS = {
    "TP2": (2, [TP]),
    "TP2 + SP": (2, [TP, SP]),
    "PP2": (2, [PP]),
    "PP2, interleaved": (
        2,
        [PP, "model.virtual_pipeline_model_parallel_size=2", "model.num_layers=4"],
    ),
    "CP2, p2p": (2, [CP, "model.cp_comm_type=p2p"]),
    "CP2, all_gather": (2, [CP, "model.cp_comm_type=all_gather"]),
    "CP2, a2a": (2, [CP, "model.cp_comm_type=a2a"]),
    "CP2, window": (2, [CP, "model.window_size=[5, 0]"]),
    "attention recomputed": (1, ["recompute.recompute_granularity=selective"]),
    "layers recomputed": (
        1,
        [
            "recompute.recompute_granularity=full",
            "recompute.recompute_method=uniform",
            "recompute.recompute_num_layers=1",
        ],
    ),
    "queries normalized": (1, ["model.qk_layernorm=true"]),
    "positions learned": (1, ["model.position_embedding_type=learned_absolute"]),
    "TP2 x CP2": (4, [TP, CP]),
}
KEPT = ("num_layers", "window_size", "qk_layernorm", "position_embedding_type")
"""What makes another model, rather than another way to compute the same one."""


def tokens_of(row):
    """Return the tokens and labels ``[32]`` of one micro-batch, and which count."""
    generator = torch.Generator().manual_seed(40 + row)
    ids = torch.randint(0, 128, (33,), generator=generator)
    mask = (torch.rand(32, generator=generator) > 0.2).float()
    return ids[:-1], ids[1:], mask


def packed_batches():
    """Return both micro-batches as packed rows."""
    batches = []
    for row, lengths in enumerate(LENGTHS):
        tokens, labels, mask = tokens_of(row)
        batches.append(
            {
                "tokens": tokens[None],
                "labels": labels[None],
                "loss_mask": mask[None],
                "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
                "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int(),
                "max_seqlen": max(lengths),
            }
        )
    return batches


def single_samples():
    """Return every sample as rows of its own, all padded at the end to one length."""
    batches = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            batch = {"position_ids": torch.arange(32)[None]}
            for name, values in zip(("tokens", "labels", "loss_mask"), tokens_of(row), strict=True):
                padded = torch.zeros(32, dtype=values.dtype)
                padded[:length] = values[start : start + length]
                batch[name] = padded[None]
            batches.append(batch)
            start += length
    return batches


def train(overrides, *, packed):
    batches = packed_batches() if packed else single_samples()
    config = tiny_config(
        "model.num_layers=2",
        "train.micro_batch_size=1",
        f"train.global_batch_size={len(batches)}",
        f"train.train_iters={STEPS}",
        "optimizer.lr=3e-3",
        "optimizer.adam_eps=1e-5",
        "scheduler.lr_decay_style=constant",
        *overrides,
    )
    engine = Engine.from_config(config)
    losses, norms = [], []
    for _ in range(STEPS):
        losses.append(float(engine.forward_backward(batches).loss))
        norms.append(engine.optimizer_step().grad_norm)
    engine.close()
    return losses, norms


def train_all(cases):
    return [train(overrides, packed=packed) for overrides, packed in cases]


def of_the_model(overrides):
    return [o for o in overrides if o.split("=")[0].removeprefix("model.") in KEPT]


@pytest.fixture(scope="module")
def results():
    """What rank 0 saw, by layout, and of single samples on one rank, by model."""
    seen = {}
    for ranks in (1, 2, 4):
        names = [name for name, (n, _) in LAYOUTS.items() if n == ranks]
        cases = [(LAYOUTS[name][1], True) for name in names]
        if ranks == 1:
            models = {tuple(of_the_model(overrides)) for _, overrides in LAYOUTS.values()}
            names += models
            cases += [(list(model), False) for model in models]
        found = run_ranks(train_all, ranks, cases, timeout_s=280)
        seen |= dict(zip(names, found[-1], strict=True))
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_rows_train_as_their_samples_do(results, name):
    losses, norms = results[name]
    expected, expected_norms = results[tuple(of_the_model(LAYOUTS[name][1]))]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert norms == pytest.approx(expected_norms, rel=5e-4)
    assert losses[-1] < losses[0] - 0.2, "it must have learnt"


def losses_by_token(overrides, changed):
    """Return the losses of this rank's tokens of a packed row, whose second sample may change."""
    from mb_engine.model.gpt import build_model
    from mb_engine.parallel.sequence import BOUNDARIES
    from mb_engine.runtime.distributed import initialize, shutdown, world_size_from_environment
    from mb_engine.runtime.seeding import seed_everything
    from mb_engine.train.objective import LanguageModelObjective
    from mb_engine.train.step import MicroBatchRunner

    config = tiny_config("model.num_layers=2", *overrides)
    config = config.finalize(world_size_from_environment())
    layout = initialize(config)
    seed_everything(config.rng, layout)
    chunks = build_model(config, layout)
    batch = packed_batches()[0]
    if changed:
        batch["tokens"] = batch["tokens"].clone()
        batch["tokens"][0, 8:12] = (batch["tokens"][0, 8:12] + 1) % 128
    runner = MicroBatchRunner(chunks=chunks, layout=layout, objective=LanguageModelObjective())
    (local,) = runner.localize([batch])
    assert BOUNDARIES not in local
    losses = chunks[0](
        local["tokens"],
        local["position_ids"],
        None,
        labels=local["labels"],
        packed_seq_params=local["packed_seq_params"],
    )
    shutdown()
    return losses.detach()[0]


def leaks(cases):
    return [[losses_by_token(o, changed) for changed in (False, True)] for o in cases]


def test_another_sample_changes_no_bit_of_a_loss():
    """Of a whole row tokens 8 to 12 are the second sample; each rank of CP2 has half of them."""
    exchanges = [[CP, f"model.cp_comm_type={kind}"] for kind in ("p2p", "all_gather", "a2a")]
    for by_rank in zip(*run_ranks(leaks, 2, [[TP], *exchanges]), strict=True):
        for before, after in by_rank:
            second = slice(8, 12) if before.numel() == 32 else slice(4, 6)
            outside = torch.ones(before.numel(), dtype=torch.bool)
            outside[second] = False
            assert torch.equal(before[outside], after[outside])
            assert not torch.equal(before[second], after[second])


def refused(batch):
    engine = Engine.from_config(
        tiny_config(CP, "train.micro_batch_size=1", "train.global_batch_size=1")
    )
    with pytest.raises(EngineError, match=r"has 6 tokens.*multiple of 4; pad it to 8"):
        engine.forward_backward([batch])
    engine.close()


def test_a_sample_that_does_not_divide_over_the_ranks_is_refused():
    batch = packed_batches()[0] | {"cu_seqlens": torch.tensor([0, 6, 32])}
    run_ranks(refused, 2, batch)
