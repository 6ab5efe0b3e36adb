# SPDX-License-Identifier: Apache-2.0
"""Norms against their formulas in float64, values and gradients, and the marks on their weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mb_engine.model.norms import LayerNorm, RMSNorm, norm_class

WIDTH, EPS = 48, 1e-3


def settings(**changes):
    values = {
        "params_dtype": torch.float32,
        "layernorm_zero_centered_gamma": False,
        "sequence_parallel": False,
    }
    return SimpleNamespace(**values | changes)


def rms_norm(x, weight, _bias):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize(("kind", "formula"), [(RMSNorm, rms_norm), (LayerNorm, layer_norm)])
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "atol"),
    [
        (torch.float32, torch.float32, 2e-5),
        (torch.bfloat16, torch.bfloat16, 6e-2),
        (torch.float32, torch.bfloat16, 6e-2),  # a float32 residual stream
    ],
)
def test_values_and_gradients_are_those_of_the_formula(
    kind, formula, zero_centred, x_dtype, w_dtype, atol
):
    torch.manual_seed(0)
    config = settings(params_dtype=w_dtype, layernorm_zero_centered_gamma=zero_centred)
    norm = kind(config, WIDTH, EPS)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(WIDTH) * 0.3)
    x = (torch.randn(5, 2, WIDTH) * 3 + 1).to(x_dtype).requires_grad_()
    grad = torch.randn(5, 2, WIDTH).to(w_dtype)
    out = norm(x)
    out.backward(grad)

    exact = [t.detach().double().requires_grad_() for t in (x, *norm.parameters())]
    weight = exact[1] + 1 if zero_centred else exact[1]
    expected = formula(exact[0], weight, exact[2] if len(exact) > 2 else 0)
    expected.backward(grad.double())
    assert out.dtype == w_dtype
    assert out.shape == x.shape
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=atol)
    if w_dtype == torch.float32:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    for found, reference in zip((x, *norm.parameters()), exact, strict=True):
        torch.testing.assert_close(found.grad.double(), reference.grad, rtol=2e-2, atol=atol * 2)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("zero_centred", [False, True])
def test_a_new_norm_scales_by_one_however_it_stores_that(kind, zero_centred):
    norm = kind(settings(layernorm_zero_centered_gamma=zero_centred), WIDTH, EPS)
    assert norm.weight.unique().tolist() == [0.0 if zero_centred else 1.0]
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(norm(x), kind(settings(), WIDTH, EPS)(x))


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_weights_say_whether_their_gradient_is_partial(kind, sequence_parallel):
    norm = kind(settings(sequence_parallel=sequence_parallel), WIDTH)
    assert {p.sequence_parallel for p in norm.parameters()} == {sequence_parallel}
    moved = norm.to("cpu")
    assert {p.sequence_parallel for p in moved.parameters()} == {sequence_parallel}


def test_norms_go_by_megatron_cores_names():
    assert norm_class("RMSNorm") is RMSNorm
    assert norm_class("LayerNorm") is LayerNorm
