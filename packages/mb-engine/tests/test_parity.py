# SPDX-License-Identifier: Apache-2.0
"""Every layout gives the loss curve of one rank, from the same weights and the same data.

Tolerance: 1e-5 absolute over 20 steps in float32. Layouts differ only in the order of additions,
which costs a few float32 roundings (6e-8 relative) a step at a loss near 5; the largest difference
that the reference measured for these layouts is 1.6e-6.

Adam's update is as large as its learning rate wherever a gradient is not quite zero, which makes
steps out of rounding noise; a larger eps keeps that out of the comparison.
"""

from __future__ import annotations

import pytest
import torch
from mb_engine import Engine
from mb_engine.testing import run_ranks, tiny_config

STEPS = 20
TOLERANCE = 1e-5
GLOBAL_BATCH = 8
TP2 = ["model.tensor_model_parallel_size=2"]
PP2 = ["model.pipeline_model_parallel_size=2"]
DISTRIBUTED = ["optimizer.use_distributed_optimizer=true"]
OVERLAP = ["ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true", "ddp.bucket_size=4096"]
DROPOUT = ["model.hidden_dropout=0.2"]
TIED = ["model.share_embeddings_and_output_weights=true"]
LAYER_NORM = ["model.normalization=LayerNorm", "model.add_bias_linear=true"]


def fixed_batches(config, layout, steps):
    """Yield the micro-batches of one data-parallel rank; the global batch is always the same."""
    generator = torch.Generator().manual_seed(20)
    vocabulary, length = config.model.vocab_size, config.model.seq_length
    mbs = config.train.micro_batch_size
    ids = torch.randint(0, vocabulary, (GLOBAL_BATCH, length + 1), generator=generator)
    mask = (torch.rand(GLOBAL_BATCH, length, generator=generator) > 0.1).float()
    for _ in range(steps):
        rows = [
            slice(start + layout.dp_rank * mbs, start + (layout.dp_rank + 1) * mbs)
            for start in range(0, GLOBAL_BATCH, mbs * layout.dp)
        ]
        yield [
            {
                "tokens": ids[row, :-1].contiguous(),
                "labels": ids[row, 1:].contiguous(),
                "loss_mask": mask[row],
                "position_ids": torch.arange(length).expand(mbs, -1),
            }
            for row in rows
        ]


def train(overrides, steps=STEPS):
    """Train on this rank; return losses, gradient norms and the replicated parameters' sums."""
    config = tiny_config(
        "model.num_layers=2",
        f"train.global_batch_size={GLOBAL_BATCH}",
        f"train.train_iters={steps}",
        "optimizer.lr=3e-3",
        "optimizer.adam_eps=1e-5",
        "scheduler.lr_decay_style=constant",
        *overrides,
    )
    engine = Engine.from_config(config)
    losses, norms = [], []
    for batches in fixed_batches(engine.config, engine.layout, steps):
        losses.append(float(engine.forward_backward(batches).loss))
        norms.append(engine.optimizer_step().grad_norm)
    replicated = {
        name: parameter.detach().double().sum().item()
        for chunk in engine.model
        for name, parameter in chunk.named_parameters()
        if not parameter.tensor_model_parallel
    }
    norm = engine.parameters_norm()
    engine.close()
    return {"losses": losses, "norms": norms, "replicated": replicated, "parameters_norm": norm}


def train_all(cases):
    """Train once with each of *cases*, one after the other in the same processes."""
    return [train(overrides) for overrides in cases]


LAYOUTS = {
    "TP2": (2, TP2, []),
    "TP2 + SP": (2, [*TP2, "model.sequence_parallel=true"], []),
    "PP2": (2, PP2, []),
    "DP2": (2, [], []),
    "DP2, overlapped reduction": (2, OVERLAP[:1] + OVERLAP[2:], []),
    "DP2, distributed optimizer": (2, DISTRIBUTED, []),
    "DP2, distributed optimizer, overlap": (2, DISTRIBUTED + OVERLAP, []),
    "CP2": (2, ["model.context_parallel_size=2"], []),
    "TP2 x PP2": (4, [*TP2, *PP2], []),
    "PP2, tied embeddings": (2, PP2, TIED),
    "TP2 + SP, LayerNorm and biases": (2, [*TP2, "model.sequence_parallel=true"], LAYER_NORM),
    "TP2, dropout": (2, TP2, DROPOUT),
    "1 rank, full recomputation": (
        1,
        [
            "recompute.recompute_granularity=full",
            "recompute.recompute_method=uniform",
            "recompute.recompute_num_layers=1",
        ],
        [],
    ),
}


SHARED = {
    "TP2": [*TP2, "model.attention_dropout=0.2", "model.hidden_dropout=0.2"],
    "TP2 + SP": [
        *TP2,
        "model.sequence_parallel=true",
        "model.attention_dropout=0.2",
        "model.hidden_dropout=0.2",
    ],
}


@pytest.fixture(scope="module")
def results():
    """What every rank saw, by name; cases of as many ranks share their processes."""
    one_rank = {tuple(common) for _, _, common in LAYOUTS.values()}
    cases = [(1, key, list(key)) for key in one_rank]
    cases += [(ranks, name, common + layout) for name, (ranks, layout, common) in LAYOUTS.items()]
    cases += [(2, f"shared {name}", overrides) for name, overrides in SHARED.items()]
    seen = {}
    for ranks in (1, 2, 4):
        names = [name for n, name, _ in cases if n == ranks]
        overrides = [o for n, _, o in cases if n == ranks]
        by_rank = run_ranks(train_all, ranks, overrides, timeout_s=280)
        seen |= {name: [rank[i] for rank in by_rank] for i, name in enumerate(names)}
    return seen


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_losses_of_one_rank(results, name):
    expected = results[tuple(LAYOUTS[name][2])][0]
    for seen in results[name]:
        worst = max(abs(a - b) for a, b in zip(seen["losses"], expected["losses"], strict=True))
        assert worst <= TOLERANCE, f"{name}: losses differ by {worst:.1e}"
        assert seen["norms"] == pytest.approx(expected["norms"], rel=5e-4)
        assert seen["parameters_norm"] == pytest.approx(expected["parameters_norm"], rel=1e-5)
    assert expected["losses"][-1] < expected["losses"][0] - 0.5, "it must have learnt"


@pytest.mark.dist
@pytest.mark.parametrize("name", SHARED)
def test_what_tensor_parallel_ranks_share_stays_the_same_on_them(results, name):
    """With dropout on the attention, whose masks differ, the replicated norms must not drift."""
    first, second = results[f"shared {name}"]
    assert first["replicated"] == second["replicated"]
    assert first["losses"] == second["losses"]
    plain = results[()][0]["losses"]
    assert abs(first["losses"][5] - plain[5]) > 1e-3, "dropout must have been on"
