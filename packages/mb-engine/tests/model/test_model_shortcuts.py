# SPDX-License-Identifier: Apache-2.0
"""What the torch spec does its own way, against formulas in float64 and megatron-core's own way."""

from __future__ import annotations

import pytest
import torch
from mb_engine.testing import run_ranks, tiny_config

MODELS = {
    "llama": [],
    "dropout": ["model.hidden_dropout=0.3", "model.attention_dropout=0.2"],
    "biases": ["model.add_bias_linear=true"],
    "not gated": ["model.gated_linear_unit=false", "model.activation_func=gelu"],
    "masked by a window": ["model.window_size=[4, 0]"],
    "half of a head rotated": ["model.rotary_percent=0.5"],
    "neighbours rotated": ["model.rotary_interleaved=true"],
    "positions learned": ["model.position_embedding_type=learned_absolute"],
    "queries normalized": ["model.qk_layernorm=true"],
    "experts": ["model.num_moe_experts=2"],
    "tied": ["model.share_embeddings_and_output_weights=true"],
    "bfloat16": ["mixed_precision=bf16_mixed"],
    "attention recomputed": ["recompute.recompute_granularity=selective"],
    "layers recomputed": [
        "recompute.recompute_granularity=full",
        "recompute.recompute_method=uniform",
        "recompute.recompute_num_layers=1",
    ],
}
SHORT_ATTENTION = {
    "llama",
    "dropout",
    "biases",
    "not gated",
    "masked by a window",
    "half of a head rotated",
    "positions learned",
    "experts",
    "tied",
    "bfloat16",
    "attention recomputed",
    "layers recomputed",
}


def both_ways(cases):
    """Return (losses, gradients, shortcuts) of each case, with shortcuts and without."""
    from mb_engine.runtime.distributed import initialize, shutdown, world_size_from_environment

    found = []
    for overrides in cases:
        config = tiny_config("model.num_layers=2", *overrides)
        config = config.finalize(world_size_from_environment())
        layout = initialize(config)
        found.append(both_ways_of(config, layout))
        shutdown()
    return found


def both_ways_of(config, layout):
    from mb_engine.model.gpt import build_model
    from mb_engine.runtime.seeding import seed_everything
    from megatron.core.models.gpt import GPTModel

    seed_everything(config.rng, layout)
    (model,) = build_model(config, layout)
    ids = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(5))
    weights = torch.rand(2, 32, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm.weight" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))

    def run():
        seed_everything(config.rng, layout)
        model.zero_grad()
        losses = model(ids[:, :-1], torch.arange(32).expand(2, -1), None, labels=ids[:, 1:])
        (losses.float() * weights).sum().backward()
        return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    short = run()
    taken = {}
    for module in model.modules():
        for flag in ("is_usual", "is_whole"):
            if hasattr(module, flag):
                taken.setdefault(type(module).__name__, set()).add(getattr(module, flag))
                setattr(module, flag, False)
        if isinstance(module, GPTModel):
            loss = GPTModel.compute_language_model_loss
            module.compute_language_model_loss = loss.__get__(module)
    return short, run(), taken


@pytest.fixture(scope="module")
def results():
    (found,) = run_ranks(both_ways, 1, list(MODELS.values()), timeout_s=240)
    return dict(zip(MODELS, found, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_short_way_computes_what_megatrons_own_way_computes(name, results):
    (losses, grads), (expected, expected_grads), _ = results[name]
    rounding = 2**-7 if name == "bfloat16" else 2**-20
    torch.testing.assert_close(losses, expected, rtol=rounding, atol=rounding)
    assert set(grads) == set(expected_grads)
    for key, gradient in expected_grads.items():
        scale = gradient.abs().max().item()
        assert scale > 0, key
        torch.testing.assert_close(
            grads[key],
            gradient,
            rtol=0,
            atol=8 * rounding * scale,
            msg=lambda m, k=key: f"{k}: {m}",
        )


@pytest.mark.parametrize("name", MODELS)
def test_the_usual_model_takes_the_short_way(name, results):
    *_, taken = results[name]
    assert taken["ColumnLinear"] == {True}
    assert taken["RowLinear"] == {True}
    assert taken["TorchTransformerLayer"] == {True}
    assert taken["TorchSelfAttention"] == {name in SHORT_ATTENTION}
    assert taken.get("TorchMLP", {True}) == {True}


class TestCrossEntropy:
    @staticmethod
    def compute(logits, labels, weights):
        from mb_engine.model.cross_entropy import token_cross_entropy

        leaf = logits.clone().requires_grad_()
        losses = token_cross_entropy(leaf * 1.0, labels)
        (losses * weights).sum().backward()
        return losses.detach(), leaf.grad

    @pytest.mark.parametrize(("rows", "width"), [(6, 7), (40, 20_000)])
    def test_is_that_of_the_formula(self, rows, width):
        generator = torch.Generator().manual_seed(1)
        logits = 5 * torch.randn(rows, 2, width, generator=generator)
        labels = torch.randint(0, width, (rows, 2), generator=generator)
        weights = torch.rand(rows, 2, generator=generator)
        exact = logits.double().requires_grad_()
        wanted = exact.logsumexp(-1) - exact.gather(-1, labels[..., None])[..., 0]
        (wanted * weights).sum().backward()
        losses, grad = self.compute(logits, labels, weights)
        torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=1e-7)

    def test_needs_no_memory_but_that_of_the_logits(self):
        from mb_engine.model.cross_entropy import token_cross_entropy

        seen = {}
        logits = torch.randn(4, 2, 9).requires_grad_() * 1.0
        logits.register_hook(lambda grad: seen.update(grad=grad.data_ptr()))
        token_cross_entropy(logits, torch.zeros(4, 2, dtype=torch.int64)).sum().backward()
        assert seen["grad"] == logits.data_ptr()

    def test_takes_negative_labels_of_masked_tokens(self):
        logits = torch.randn(4, 1, 9)
        labels = torch.tensor([[1], [-100], [2], [-1]])
        mask = (labels >= 0).float()
        _, grad = self.compute(logits, labels, mask)
        assert grad[labels[:, 0] < 0].abs().max() == 0
        assert grad[labels[:, 0] >= 0].abs().max() > 0

    def test_of_bfloat16_logits_is_computed_in_float32(self):
        logits, labels = torch.randn(5, 2, 30).bfloat16(), torch.arange(10).view(5, 2)
        losses, grad = self.compute(logits, labels, torch.ones(5, 2))
        exact = torch.nn.functional.cross_entropy(
            logits.double().flatten(0, 1), labels.flatten(), reduction="none"
        )
        assert losses.dtype == torch.float32
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(losses.flatten().double(), exact, rtol=1e-6, atol=1e-6)


class TestRotation:
    def test_turns_pairs_of_halves_by_the_angle_of_their_position(self):
        from mb_engine.model.rotary import rotary_table, split_and_rotate

        seq, batch, groups, queries, width = 5, 3, 2, 3, 8
        generator = torch.Generator().manual_seed(2)
        mixed = torch.randn(
            seq, batch, groups * (queries + 2) * width, generator=generator, dtype=torch.float64
        ).requires_grad_()
        half = torch.rand(seq, width // 2, generator=generator, dtype=torch.float64) * 6
        angles = torch.cat((half, half), -1)[:, None, None]
        turn = torch.polar(torch.ones_like(half), half)[:, None, None]

        def exact(heads):
            a, b = heads.chunk(2, -1)
            turned = torch.complex(a, b) * turn
            return torch.cat((turned.real, turned.imag), -1)

        parts = mixed.view(seq, batch, groups, queries + 2, width)
        wanted = (
            exact(parts[..., :queries, :].flatten(2, 3)),
            exact(parts[..., queries, :]),
            parts[..., queries + 1, :],
        )
        table = rotary_table(angles, torch.float64)
        found = split_and_rotate(mixed, *table, groups=groups, width=width)
        loss = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in wanted]
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
        (expected_grad,) = torch.autograd.grad(wanted, mixed, loss, retain_graph=True)
        (grad,) = torch.autograd.grad(found, mixed, loss)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-14)

    def test_computes_the_table_once_for_each_length(self):
        from mb_engine.model.rotary import rotary_table

        angles = torch.rand(4, 1, 1, 8)
        first = rotary_table(angles, torch.float32)
        assert rotary_table(angles, torch.float32)[0] is first[0]
        assert rotary_table(angles.clone(), torch.float32)[0] is not first[0]


class TestNorm:
    def make(self, width, **fields):
        from types import SimpleNamespace

        from mb_engine.model.norms import RMSNorm

        settings = {"layernorm_zero_centered_gamma": False, "sequence_parallel": False}
        config = SimpleNamespace(params_dtype=torch.float32, **settings | fields)
        norm = RMSNorm(config, width, eps=1e-3)
        with torch.no_grad():
            norm.weight.add_(torch.randn(width, generator=torch.Generator().manual_seed(3)))
        return norm

    @pytest.mark.parametrize("centered", [False, True])
    @pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
    def test_and_its_gradients_are_those_of_the_formula(self, centered, order):
        norm = self.make(6, layernorm_zero_centered_gamma=centered)
        values = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(4))
        upstream = torch.randn(values.permute(order).shape)
        exact, weight = values.double().requires_grad_(), norm.weight.detach().double()
        weight.requires_grad_()
        x = exact.permute(order)
        wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (weight + centered)
        wanted.backward(upstream.double())
        leaf = values.clone().requires_grad_()
        found = norm(leaf.permute(order))
        found.backward(upstream)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)

    def test_refuses_a_gradient_of_its_gradient(self):
        from mb_engine.errors import EngineError

        x = torch.randn(3, 6, requires_grad=True)
        with pytest.raises(EngineError, match="first derivatives only"):
            torch.autograd.grad(self.make(6)(x).sum(), x, create_graph=True)
