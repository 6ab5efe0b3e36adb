# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients of two ranks are those of one, from the same seed, in every layout."""

from __future__ import annotations

import pytest
import torch
from mb_engine.testing import run_ranks, tiny_config

pytestmark = pytest.mark.dist

TP = "model.tensor_model_parallel_size=2"
SP = "model.sequence_parallel=true"
PP = "model.pipeline_model_parallel_size=2"
CP = "model.context_parallel_size=2"
EP = "model.expert_model_parallel_size=2"

MODELS = {
    "plain": (),
    "window": ("model.window_size=[5, 0]",),
    "tied, normalized queries": (
        "model.share_embeddings_and_output_weights=true",
        "model.qk_layernorm=true",
    ),
    "layer norm, biases": (
        "model.normalization=LayerNorm",
        "model.add_bias_linear=true",
        "model.layernorm_zero_centered_gamma=true",
    ),
    "experts": ("model.num_moe_experts=4", "model.moe_layer_freq=[0, 1]"),
}
LAYOUTS = {
    "TP2": (TP,),
    "TP2 with SP": (TP, SP),
    "PP2": (PP,),
    "CP2": (CP,),
    "EP2": (EP,),
    "EP2, all to all": (EP, "model.moe_token_dispatcher_type=alltoall"),
}
CASES = [
    (model, layout)
    for model in MODELS
    for layout in LAYOUTS
    if "EP" not in layout or model == "experts"
]
# Megatron-core shards experts over TP only with sequence parallelism.
CASES.remove(("experts", "TP2"))


def run_cases(cases):
    """Return per-token losses and gradients by global name of each case, for this rank."""
    return [run_case(overrides) for overrides in cases]


def run_case(overrides):
    from mb_engine.model.gpt import build_model
    from mb_engine.parallel.sequence import context_parallel_slice
    from mb_engine.runtime.distributed import initialize, shutdown, world_size_from_environment
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config("model.num_layers=2", *overrides).finalize(world_size_from_environment())
    layout = initialize(config)
    seed_everything(config.rng, layout)
    (model,) = build_model(config, layout)
    ids = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(5))
    batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:]}
    batch = context_parallel_slice(batch, cp=layout.cp, cp_rank=layout.cp_rank)
    losses = forward_backward(model, layout, batch["tokens"], batch["labels"].contiguous())
    result = {"losses": losses, "gradients": gradients(model, config, layout), "cp": layout.cp}
    shutdown()
    return result


def forward_backward(model, layout, tokens, labels):
    """Run one batch through all stages by hand; return the losses on the last one."""
    from torch import distributed as dist

    positions = torch.arange(32).expand_as(tokens) if layout.cp == 1 else None
    if layout.pp == 1:
        losses = model(tokens, positions, None, labels=labels)
        losses.sum().backward()
        return losses.detach()
    if layout.pp_rank == 0:
        hidden = model(tokens, positions, None)
        dist.send(hidden.detach(), 1)
        gradient = torch.empty_like(hidden)
        dist.recv(gradient, 1)
        hidden.backward(gradient)
        return None
    hidden = torch.empty(32, 2, 64)
    dist.recv(hidden, 0)
    model.set_input_tensor(hidden.requires_grad_())
    losses = model(tokens, positions, None, labels=labels)
    losses.sum().backward()
    dist.send(hidden.grad, 0)
    return losses.detach()


def gradients(model, config, layout):
    """Return this rank's pieces of the gradients.

    What a data-parallel wrapper and the schedule would do is done here: replicas add up over CP,
    and parameters that saw only a part of the tokens or heads add up over TP.
    """
    from mb_engine.parallel.shards import model_shards

    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if layout.cp > 1:
            torch.distributed.all_reduce(grad, group=layout.groups["cp"])
        partial_sum = getattr(parameter, "sequence_parallel", False) or (
            "q_layernorm" in name or "k_layernorm" in name
        )
        if layout.tp > 1 and partial_sum:
            torch.distributed.all_reduce(grad, group=layout.groups["tp"])
        if layout.pp > 1 and getattr(parameter, "shared_embedding", False):
            torch.distributed.all_reduce(grad, group=layout.groups["pp"])
        if layout.ep > 1 and getattr(parameter, "allreduce", True):
            torch.distributed.all_reduce(grad, group=layout.groups["dp"])
            grad /= layout.ep  # both data-parallel ranks had the same batch
        elif layout.ep > 1:
            grad /= layout.ep
        parameter.data = grad
    return [
        (s.key, s.global_shape, s.offset, s.local_shape, s.data.clone())
        for s in model_shards([model])
    ]


def whole(pieces):
    """Return the tensors that *pieces* of all ranks make up, by key."""
    out = {}
    for key, shape, offset, extent, values in pieces:
        tensor = out.setdefault(key, torch.full(shape, float("nan")))
        tensor[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))] = values
    return out


def in_order(parts):
    """Return whole sequences from the zig-zag parts of two CP ranks."""
    (a, d), (b, c) = (part.chunk(2, dim=1) for part in parts)
    return torch.cat([a, b, c, d], dim=1)


@pytest.fixture(scope="module")
def one_rank():
    (results,) = run_ranks(run_cases, 1, list(MODELS.values()), timeout_s=240)
    return dict(zip(MODELS, results, strict=True))


@pytest.fixture(scope="module")
def two_ranks():
    overrides = [MODELS[model] + LAYOUTS[layout] for model, layout in CASES]
    results = run_ranks(run_cases, 2, overrides, timeout_s=400)
    return dict(zip(CASES, zip(*results, strict=True), strict=True))


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_two_ranks_compute_what_one_computes(model, layout, one_rank, two_ranks):
    expected, ranks = one_rank[model], two_ranks[model, layout]
    if ranks[0]["cp"] == 2:
        losses = in_order([rank["losses"] for rank in ranks])
    else:
        losses = ranks[1]["losses"]
    torch.testing.assert_close(losses, expected["losses"], rtol=0, atol=2e-6)

    reference = whole(expected["gradients"])
    assert max(g.abs().max() for g in reference.values()) > 1e-2
    found = whole([piece for rank in ranks for piece in rank["gradients"]])
    assert set(found) == set(reference)
    for key, gradient in reference.items():
        torch.testing.assert_close(
            found[key], gradient, rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_another_seed_gives_other_weights(one_rank):
    ((result,),) = run_ranks(run_cases, 1, [("rng.seed=99",)])
    assert (result["losses"] - one_rank["plain"]["losses"]).abs().max() > 1e-2
