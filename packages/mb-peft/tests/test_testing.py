# SPDX-License-Identifier: Apache-2.0
"""The factory kit passes two kinds of linears and catches broken factories."""

from __future__ import annotations

import attrs
import pytest
import torch
from mb_config import LoRA
from mb_peft import TorchLinears, inject, merge
from mb_peft.testing import check_factory
from torch import nn
from transformers.pytorch_utils import Conv1D


def make_linear():
    return nn.Linear(6, 9)


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class DeferredBias(nn.Module):
    """Returns its bias for the caller to add, as megatron-core's linears do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 6))
        self.deferred = nn.Parameter(torch.randn(9))

    def forward(self, x):
        return x @ self.weight.T, self.deferred


@attrs.frozen
class TransposedLinears:
    """For GPT-2's ``Conv1D``, whose weight is ``[in, out]``, and for ``DeferredBias``."""

    def pair(self, base, *, rank):
        if isinstance(base, DeferredBias):
            return nn.Linear(6, rank, bias=False), nn.Linear(rank, 9, bias=False)
        if not isinstance(base, Conv1D):
            return None
        return nn.Linear(base.nx, rank, bias=False), nn.Linear(rank, base.nf, bias=False)

    def call(self, base, x, adapter):
        y = base(x)
        return (y[0] + adapter(x), y[1]) if isinstance(y, tuple) else y + adapter(x)

    def merged(self, base, delta):
        return base.weight + (delta.T if isinstance(base, Conv1D) else delta)


def make_conv():
    conv = Conv1D(9, 6)
    nn.init.normal_(conv.weight)
    return conv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_linears_pass(x, dtype):
    check_factory(TorchLinears(), lambda: make_linear().to(dtype), x.to(dtype))


def test_torch_linears_with_wide_adapters_pass_in_bfloat16(x):
    factory = TorchLinears(dtype=torch.float32)
    check_factory(factory, lambda: make_linear().bfloat16(), x.bfloat16(), tolerance=2e-2)


@pytest.mark.parametrize("make", [make_conv, DeferredBias])
def test_a_foreign_factory_passes(x, make):
    check_factory(TransposedLinears(), make, x)


def test_a_foreign_factory_serves_inject_and_merge(x):
    model = nn.Sequential(make_conv())
    inject(model, LoRA(rank=2), targets=["0"], factory=TransposedLinears())
    nn.init.normal_(model[0].lora_b.weight)
    before = model(x)
    merge(model)
    torch.testing.assert_close(model(x), before)


class Ignored(TorchLinears):
    def call(self, base, x, adapter):
        return base(x)


class NotScaled(TorchLinears):
    def call(self, base, x, adapter):
        return base(x) + torch.tanh(adapter(x))


class WrongMerge(TorchLinears):
    def merged(self, base, delta):
        return base.weight - delta


class TakesAll(TorchLinears):
    def pair(self, base, *, rank):
        return nn.Linear(6, rank, bias=False), nn.Linear(rank, 9, bias=False)


class WithBias(TorchLinears):
    def pair(self, base, *, rank):
        return nn.Linear(6, rank), nn.Linear(rank, 9)


class TakesNone(TorchLinears):
    def pair(self, base, *, rank):
        return None


class ReturnsMore(TorchLinears):
    def call(self, base, x, adapter):
        return super().call(base, x, adapter), None


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Ignored(), "does not require grad|gets no gradient"),
        (NotScaled(), "not linear in the scale"),
        (WrongMerge(), "merging changes the output"),
        (TakesAll(), "an Embedding was taken"),
        (WithBias(), "more than its matrix"),
        (TakesNone(), "was not taken for a linear"),
        (ReturnsMore(), "another type"),
    ],
)
def test_a_broken_factory_is_caught(x, factory, message):
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_factory(factory, make_linear, x)
