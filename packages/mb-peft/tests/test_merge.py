# SPDX-License-Identifier: Apache-2.0
"""Merging adapters into weights and taking them out."""

from __future__ import annotations

import pytest
import torch
from mb_config import LoRA
from mb_peft import PeftError, adapters, disabled, inject, merge, remove, unmerge
from torch import nn


@pytest.fixture
def adapted(model):
    inject(model, LoRA(rank=3, alpha=5), targets=["*_proj", "head"])
    torch.manual_seed(3)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_b.weight)
    return model


def test_the_merged_model_equals_the_adapted_one_in_float64(adapted, ids):
    before = adapted(ids)
    assert merge(adapted) == 7
    torch.testing.assert_close(adapted(ids), before, rtol=1e-12, atol=1e-12)
    assert remove(adapted) == 7
    torch.testing.assert_close(adapted(ids), before, rtol=1e-12, atol=1e-12)
    assert not any(".base." in name or "lora" in name for name in adapted.state_dict())


def test_the_merged_weight_is_the_formula(adapted):
    layer = adapted.layers[1].v_proj
    a, b = layer.lora_a.weight, layer.lora_b.weight
    want = layer.base.weight + 5 / 3 * torch.einsum("or,ri->oi", b, a)
    merge(adapted)
    torch.testing.assert_close(layer.weight, want.detach(), rtol=1e-14, atol=1e-14)


def test_unmerging_restores_every_bit(adapted, ids):
    adapted.bfloat16()
    before = adapted(ids)
    weights = {name: p.clone() for name, p in adapted.state_dict().items()}
    merge(adapted)
    assert not torch.equal(adapted.head.weight, weights["head.base.weight"])
    assert unmerge(adapted) == 7
    assert torch.equal(adapted(ids), before)
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_narrow_weight_is_rounded_once():
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    inject(model, LoRA(rank=8, alpha=3), targets=["0"])
    nn.init.normal_(model[0].lora_b.weight)
    layer = model[0]
    exact = layer.base.weight.double() + 3 / 8 * (
        layer.lora_b.weight.double() @ layer.lora_a.weight.double()
    )
    merge(model)
    torch.testing.assert_close(layer.weight, exact.bfloat16(), rtol=2**-8, atol=0)
    assert (layer.weight == exact.bfloat16()).float().mean() > 0.99


def test_a_tied_embedding_keeps_its_weight(adapted, ids):
    embedding = adapted.embed.weight.clone()
    assert adapted.head.weight is adapted.embed.weight
    merge(adapted)
    assert torch.equal(adapted.embed.weight, embedding)
    assert not torch.allclose(adapted.head.weight, embedding)
    unmerge(adapted)
    assert adapted.head.weight is adapted.embed.weight


def test_doing_it_twice_does_nothing(adapted, ids):
    merge(adapted)
    once = adapted(ids)
    assert merge(adapted) == 0
    assert torch.equal(adapted(ids), once)
    assert unmerge(adapted) == 7
    assert unmerge(adapted) == 0


def test_an_irreversible_merge_keeps_no_second_weight_and_says_so(adapted):
    merge(adapted, reversible=False)
    for act in (unmerge, lambda model: disabled(model).__enter__()):
        with pytest.raises(PeftError, match="merged with reversible=False, so its old weight is"):
            act(adapted)
    assert all(layer.merged and layer.enabled for layer in adapters(adapted).values())


@pytest.mark.parametrize("act", [merge, unmerge])
def test_a_model_without_adapters_is_refused(model, act):
    with pytest.raises(PeftError, match=r"no adapters; inject\(model"):
        act(model)
