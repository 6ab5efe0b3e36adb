# SPDX-License-Identifier: Apache-2.0
"""Experts train alike in every layout, and are balanced by the losses of the papers.

Tolerance of layouts: 1e-5 absolute in float32, as for dense models (see test_parity.py).
"""

from __future__ import annotations

import pytest
import torch
from mb_engine import Engine, EngineError
from mb_engine.testing import run_ranks, tiny_config

STEPS = 3
TOKENS = 32 * 8
BASE = (
    "model.num_layers=2",
    "model.num_moe_experts=4",
    "model.moe_layer_freq=[0, 1]",
    f"train.train_iters={STEPS}",
    "optimizer.lr=3e-3",
    "optimizer.adam_eps=1e-5",
    "scheduler.lr_decay_style=constant",
)
EP2 = ("model.expert_model_parallel_size=2",)
ALLTOALL = (*EP2, "model.moe_token_dispatcher_type=alltoall")
TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
CP2 = ("model.context_parallel_size=2",)
PP2 = ("model.pipeline_model_parallel_size=2",)
MODELS = {
    "aux and z loss, gated shared expert": (
        "model.moe_aux_loss_coeff=0.05",
        "model.moe_z_loss_coeff=0.01",
        "model.moe_shared_expert_intermediate_size=64",
        "model.moe_shared_expert_gate=true",
    ),
    "loss a sequence": (
        "model.moe_router_load_balancing_type=seq_aux_loss",
        "model.moe_aux_loss_coeff=0.05",
    ),
    "loss of the global batch": (
        "model.moe_router_load_balancing_type=global_aux_loss",
        "model.moe_aux_loss_coeff=0.05",
    ),
    "sinkhorn": ("model.moe_router_load_balancing_type=sinkhorn", "model.moe_router_topk=1"),
    "capacity": ("model.moe_expert_capacity_factor=0.8",),
    "capacity, first come": (
        "model.moe_expert_capacity_factor=0.8",
        "model.moe_token_drop_policy=position",
    ),
    "sigmoid scores, bias on the choice": (
        "model.moe_router_score_function=sigmoid",
        "model.moe_router_enable_expert_bias=true",
        "model.moe_router_load_balancing_type=none",
        "model.moe_router_bias_update_rate=0.05",
        "model.moe_router_topk_scaling_factor=1.5",
    ),
    "biases": ("model.add_bias_linear=true",),
}
FIRST, *_, BIASES = MODELS
LAYOUTS = {
    "EP2": (2, EP2),
    "EP2, all to all": (2, ALLTOALL),
    "EP2, all to all, shared expert overlapped": (
        2,
        (*ALLTOALL, "model.moe_shared_expert_overlap=true"),
    ),
    "TP2": (2, TP2),
    "CP2": (2, CP2),
    "PP2": (2, PP2),
    "EP2 x TP2": (4, (*ALLTOALL, *TP2)),
    "EP2 x TP2, whole experts": (4, (*ALLTOALL, *TP2, "model.expert_tensor_parallel_size=1")),
    "EP2 x PP2": (4, (*ALLTOALL, *PP2)),
    "EP2 x DP2, distributed optimizer": (
        4,
        (*ALLTOALL, "optimizer.use_distributed_optimizer=true"),
    ),
}
CASES = [(FIRST, layout) for layout in LAYOUTS]
CASES += [(model, layout) for model in list(MODELS)[1:] for layout in ("TP2", "CP2")]
CASES += [("sigmoid scores, bias on the choice", "EP2, all to all")]
CASES += [(BIASES, "EP2 x TP2, whole experts")]
# Which tokens come first is not known to ranks that share a sequence; a rule refuses it.
CASES.remove(("capacity, first come", "CP2"))
# Biases cannot be split, and experts are whole beside TP with EP alone.
CASES.remove((BIASES, "TP2"))


def batches(layout, *, size=2):
    """Return this rank's micro-batches of the same 8 sequences."""
    ids = torch.randint(0, 128, (8, 33), generator=torch.Generator().manual_seed(20))
    starts = range(layout.dp_rank * size, 8, size * layout.dp)
    return [
        {
            "tokens": ids[s : s + size, :-1].contiguous(),
            "labels": ids[s : s + size, 1:].contiguous(),
            "loss_mask": torch.ones(size, 32),
            "position_ids": torch.arange(32).expand(size, -1),
        }
        for s in starts
    ]


def train(overrides):
    engine = Engine.from_config(tiny_config(*BASE, *overrides))
    losses, metrics = [], []
    for _ in range(STEPS):
        terms = engine.forward_backward(batches(engine.layout))
        engine.optimizer_step()
        losses.append(float(terms.loss))
        metrics.append({name: float(s / n) for name, (s, n) in terms.metrics.items()})
    engine.close()
    return losses, metrics


def train_all(cases):
    return [train(overrides) for overrides in cases]


@pytest.fixture(scope="module")
def runs():
    (alone,) = run_ranks(train_all, 1, list(MODELS.values()))
    found = {(model, None): run for model, run in zip(MODELS, alone, strict=True)}
    for ranks in (2, 4):
        cases = [case for case in CASES if LAYOUTS[case[1]][0] == ranks]
        overrides = [MODELS[model] + LAYOUTS[layout][1] for model, layout in cases]
        by_rank = run_ranks(train_all, ranks, overrides, timeout_s=280)
        found |= {case: [rank[i] for rank in by_rank] for i, case in enumerate(cases)}
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_a_layout_gives_losses_and_metrics_of_one_rank(runs, model, layout):
    losses, metrics = runs[model, None]
    for seen, reported in runs[model, layout]:
        assert seen == pytest.approx(losses, abs=1e-5)
        assert reported == [pytest.approx(m, rel=1e-5) for m in metrics]
    assert losses[-1] < losses[0] - 0.05, "it must have learnt"


@pytest.mark.dist
def test_balancing_losses_are_reported_by_name(runs):
    names = [set(runs[model, None][1][0]) for model in MODELS]
    assert names == [
        {"load_balancing_loss", "z_loss"},
        {"seq_load_balancing_loss"},
        {"global_load_balancing_loss"},
        *[set()] * 5,
    ]


def softmax_loss(logits_TE, load_E, topk):
    """Return ``E * sum_e f_e P_e`` for a load of shares f."""
    return 4 * (load_E * logits_TE.softmax(-1).mean(0)).sum() / topk


def chosen(logits_TE, topk=2):
    return torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(topk).indices, 1.0)


def over_micro_batch(micro_batches):
    return [softmax_loss(x, chosen(x).mean(0), 2) for x in (m.flatten(0, 1) for m in micro_batches)]


def over_sequences(micro_batches):
    return [
        sum(softmax_loss(x, chosen(x).mean(0), 2) for x in m.unbind(1)) / m.size(1)
        for m in micro_batches
    ]


def over_step(micro_batches):
    flat = [m.flatten(0, 1) for m in micro_batches]
    loads = [chosen(x).mean(0) for x in flat]
    return [softmax_loss(x, sum(loads[: i + 1]) / (i + 1), 2) for i, x in enumerate(flat)]


def squared_partition(micro_batches):
    return [m.flatten(0, 1).logsumexp(-1).square().mean() for m in micro_batches]


FORMULAS = {
    "load_balancing_loss": (
        over_micro_batch,
        ("model.moe_aux_loss_coeff", "model.moe_router_load_balancing_type=aux_loss"),
    ),
    "seq_load_balancing_loss": (
        over_sequences,
        ("model.moe_aux_loss_coeff", "model.moe_router_load_balancing_type=seq_aux_loss"),
    ),
    "global_load_balancing_loss": (
        over_step,
        ("model.moe_aux_loss_coeff", "model.moe_router_load_balancing_type=global_aux_loss"),
    ),
    "z_loss": (squared_partition, ("model.moe_z_loss_coeff",)),
}


def router_gradients(cases):
    """Return metrics, the router's inputs and its weight and gradient for each of *cases*."""
    results = []
    for overrides in cases:
        engine = Engine.from_config(tiny_config(*BASE, *overrides))
        router = engine.model[0].decoder.layers[1].mlp.router
        inputs = []
        router.register_forward_hook(lambda _m, args, _o, to=inputs: to.append(args[0].detach()))
        terms = engine.forward_backward(batches(engine.layout))
        metrics = {name: float(s / n) for name, (s, n) in terms.metrics.items()}
        weight, gradient = router.weight.detach().clone(), router.weight.main_grad.clone()
        results.append((metrics, inputs, weight, gradient))
        engine.close()
    return results


@pytest.mark.dist
@pytest.mark.parametrize("per_token", [True, False])
def test_balancing_losses_and_their_gradients_are_those_of_the_papers(per_token):
    """The gradient that a coefficient adds is the coefficient times that of the mean loss."""
    token = f"model.calculate_per_token_loss={str(per_token).lower()}"
    cases = [(token,)] + [(token, f"{name}=0.5", *rest) for _, (name, *rest) in FORMULAS.values()]
    ((plain, *others),) = run_ranks(router_gradients, 1, cases)
    for (name, (formula, _)), (metrics, inputs, weight, gradient) in zip(
        FORMULAS.items(), others, strict=True
    ):
        exact = weight.double().requires_grad_()
        losses = formula([x.double() @ exact.t() for x in inputs])
        mean = sum(losses) / len(losses)
        assert metrics == {name: pytest.approx(mean.item(), rel=1e-5)}
        (expected,) = torch.autograd.grad(0.5 * mean, exact)
        added = (gradient - plain[3]).double()
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.moe_grouped_gemm=true", r"moe_grouped_gemm=True needs Transformer Engine.*one exp"),
        ("model.moe_permute_fusion=true", r"moe_permute_fusion=True needs Transformer Engine"),
        ("model.moe_router_fusion=true", r"moe_router_fusion=True needs Transformer Engine"),
    ],
)
def test_kernels_that_torch_does_not_have_are_refused(override, says):
    from mb_engine.model.expert_kernels import check_expert_kernels
    from mb_engine.model.gpt import transformer_config
    from mb_engine.runtime.megatron_compat import prepare_megatron

    prepare_megatron()
    config = transformer_config(tiny_config(*BASE).finalize(1))
    name, _, _ = override.removeprefix("model.").partition("=")
    setattr(config, name, True)
    with pytest.raises(EngineError, match=says):
        check_expert_kernels(config, layer_spec="torch")


def test_the_flex_dispatcher_is_refused_without_its_kernels():
    from mb_engine.model.expert_kernels import check_expert_kernels
    from mb_engine.model.gpt import transformer_config

    config = transformer_config(tiny_config(*BASE).finalize(1))
    config.moe_token_dispatcher_type = "flex"
    with pytest.raises(EngineError, match=r"flex: its backend deepep needs DeepEP.*use alltoall"):
        check_expert_kernels(config, layer_spec="te")
