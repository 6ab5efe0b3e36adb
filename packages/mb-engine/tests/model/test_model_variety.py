# SPDX-License-Identifier: Apache-2.0
"""Predictions ahead, latent attention and pipeline layouts: the same model in every layout.

Tolerance of layouts: 1e-5 absolute in float32, as for dense models (see test_parity.py).
"""

from __future__ import annotations

import pytest
import torch
from mb_engine import Engine
from mb_engine.testing import run_ranks, tiny_config

STEPS = 3
FACTOR = 0.3
BASE = (
    "model.num_layers=4",
    f"train.train_iters={STEPS}",
    "optimizer.lr=3e-3",
    "optimizer.adam_eps=1e-5",
    "scheduler.lr_decay_style=constant",
)
AHEAD = ("model.mtp_num_layers=2", f"model.mtp_loss_scaling_factor={FACTOR}")
LATENT = (
    "model.multi_latent_attention=true",
    "model.num_query_groups=null",
    "model.q_lora_rank=24",
    "model.kv_lora_rank=16",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=12",
    "model.qk_layernorm=true",
)
YARN = (
    "model.rope_type=yarn",
    "model.rotary_scaling_factor=4",
    "model.original_max_position_embeddings=8",
    "model.mscale_all_dim=1.0",
)
MODELS = {
    "dense": (),
    "ahead": AHEAD,
    "latent": LATENT,
    "latent, yarn": (*LATENT, *YARN),
    "latent, experts, ahead": (*LATENT, *AHEAD, "model.num_moe_experts=4"),
}
TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
CP2 = ("model.context_parallel_size=2",)
PP2 = ("model.pipeline_model_parallel_size=2",)
VPP2 = (*PP2, "model.virtual_pipeline_model_parallel_size=2")


def explicit(layout):
    return (*PP2, f'model.pipeline_model_parallel_layout="{layout}"')


CASES = {
    "dense, interleaved": ("dense", VPP2),
    "dense, explicit": ("dense", explicit("Et|tttL")),
    "dense, explicit and interleaved": ("dense", explicit("Et|tt|t|L")),
    "dense, two uneven stages": ("dense", (*PP2, "model.num_layers_in_last_pipeline_stage=1")),
    "ahead, TP2": ("ahead", TP2),
    "ahead, CP2": ("ahead", CP2),
    "ahead, PP2": ("ahead", PP2),
    "ahead, interleaved": ("ahead", VPP2),
    "ahead, explicit": ("ahead", explicit("Ett|t|t|mmL")),
    "latent, TP2": ("latent, yarn", TP2),
    "latent, CP2": ("latent", CP2),
    "latent, PP2": ("latent", PP2),
    "all, EP2": ("latent, experts, ahead", ("model.expert_model_parallel_size=2",)),
}


def batches(layout, *, size=2):
    """Return this rank's micro-batches of the same 8 sequences, some tokens masked."""
    generator = torch.Generator().manual_seed(20)
    ids = torch.randint(0, 128, (8, 33), generator=generator)
    mask = (torch.rand(8, 32, generator=generator) > 0.2).float()
    starts = range(layout.dp_rank * size, 8, size * layout.dp)
    return [
        {
            "tokens": ids[s : s + size, :-1].contiguous(),
            "labels": ids[s : s + size, 1:].contiguous(),
            "loss_mask": mask[s : s + size],
            "position_ids": torch.arange(32).expand(size, -1),
        }
        for s in starts
    ]


def train(overrides):
    """Return losses, metrics, and this rank's pieces of the model before training."""
    engine = Engine.from_config(tiny_config(*BASE, *overrides))
    pieces = [
        (s.key, s.global_shape, s.offset, s.local_shape, s.data.clone())
        for s in engine.model_shards()
    ]
    losses, metrics = [], []
    for _ in range(STEPS):
        terms = engine.forward_backward(batches(engine.layout))
        engine.optimizer_step()
        losses.append(float(terms.loss))
        metrics.append({name: float(s / n) for name, (s, n) in terms.metrics.items()})
    engine.close()
    return losses, metrics, pieces


def train_all(cases):
    return [train(overrides) for overrides in cases]


@pytest.fixture(scope="module")
def alone():
    (found,) = run_ranks(train_all, 1, list(MODELS.values()), timeout_s=280)
    return dict(zip(MODELS, found, strict=True))


@pytest.fixture(scope="module")
def together():
    overrides = [MODELS[model] + layout for model, layout in CASES.values()]
    by_rank = run_ranks(train_all, 2, overrides, timeout_s=280)
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(CASES)}


def whole(pieces):
    """Return the tensors that *pieces* of all ranks make up, by key."""
    out = {}
    for key, shape, offset, extent, values in pieces:
        tensor = out.setdefault(key, torch.full(shape, float("nan")))
        tensor[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))] = values
    return out


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_a_layout_gives_losses_and_metrics_of_one_rank(alone, together, case):
    losses, metrics, _ = alone[CASES[case][0]]
    for seen, reported, _ in together[case]:
        assert seen == pytest.approx(losses, abs=1e-5)
        assert reported == [pytest.approx(m, abs=1e-5) for m in metrics]
    assert losses[-1] < losses[0] - 0.3, "it must have learnt"


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_pieces_of_all_ranks_are_the_tensors_of_one(alone, together, case):
    expected = whole(alone[CASES[case][0]][2])
    found = whole([piece for rank in together[case] for piece in rank[2]])
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def first_gradients(overrides):
    """Return losses, metrics and gradients of one step on one rank, and states ahead."""
    engine = Engine.from_config(tiny_config(*BASE, *overrides))
    model, seen = engine.model[0], []
    model.mtp.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    terms = engine.forward_backward(batches(engine.layout))
    metrics = {name: float(s / n) for name, (s, n) in terms.metrics.items()}
    weight = model.output_layer.weight
    result = float(terms.loss), metrics, seen, weight.detach(), weight.main_grad.clone()
    micro_batches = batches(engine.layout)
    engine.close()
    return (*result, micro_batches)


@pytest.mark.dist
def test_the_loss_is_the_main_loss_and_the_weighted_mean_of_those_ahead():
    """The output layer's gradient is that of the textbook formula in float64."""
    ((main, metrics, states, weight, gradient, micro_batches),) = run_ranks(
        first_gradients, 1, AHEAD
    )
    exact = weight.double().requires_grad_()
    sums, counts = [torch.zeros(()).double()] * 3, [0.0] * 3
    for batch, state in zip(micro_batches, states, strict=True):
        for k, hidden_SBH in enumerate(state.double().chunk(3)):
            logits = (hidden_SBH @ exact.t()).transpose(0, 1)[:, : 32 - k]
            labels, mask = batch["labels"][:, k:], batch["loss_mask"][:, k:].double()
            losses = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            sums[k] = sums[k] + (losses * mask).sum()
            counts[k] += mask.sum().item()
    assert main == pytest.approx(sums[0].item() / counts[0], abs=1e-5)
    for k in (1, 2):
        assert metrics[f"mtp_{k}_loss"] == pytest.approx(sums[k].item() / counts[k], abs=1e-5)
    total = (sums[0] + FACTOR * (sums[1] + sums[2]) / 2) / counts[0]
    (expected,) = torch.autograd.grad(total, exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.dist
def test_recomputing_up_projections_changes_nothing(alone):
    recompute = (
        "recompute.recompute_granularity=selective",
        "recompute.recompute_modules=[mla_up_proj]",
    )
    ((losses, _, _),) = run_ranks(train, 1, (*LATENT, *recompute))
    assert losses == alone["latent"][0]
