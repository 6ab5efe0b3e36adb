# SPDX-License-Identifier: Apache-2.0
"""Recomputation keeps less for the backward pass and gives the gradients of keeping everything.

Dropout is on, so that a mask drawn anew instead of replayed would show. Recomputed layers run the
same operations on the same inputs in the same order: gradients are equal to the last bit. Parts of
layers take another way through megatron-core, which adds up the same gradients in another order;
that is allowed 1e-6 of the largest gradient, some float32 roundings.
"""

from __future__ import annotations

import pytest
import torch
from mb_engine import Engine
from mb_engine.testing import run_ranks, tiny_config

DROPOUT = ["model.hidden_dropout=0.2", "model.attention_dropout=0.1"]
EXPERTS = [
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=32",
    "model.moe_shared_expert_intermediate_size=64",
]
LATENT = [
    "model.multi_latent_attention=true",
    "model.num_query_groups=null",
    "model.q_lora_rank=48",
    "model.kv_lora_rank=32",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=16",
]
PP2 = ["model.pipeline_model_parallel_size=2"]


def full(method, layers):
    return [
        "recompute.recompute_granularity=full",
        f"recompute.recompute_method={method}",
        f"recompute.recompute_num_layers={layers}",
    ]


def selective(*modules):
    return [
        "recompute.recompute_granularity=selective",
        f"recompute.recompute_modules=[{', '.join(modules)}]",
    ]


# name: overrides, largest share of what "none" keeps that it may keep
DENSE = {
    "full, uniform, layer by layer": (full("uniform", 1), 0.25),
    "full, uniform, two layers a group": (full("uniform", 2), 0.25),
    "full, block of two": (full("block", 2), 0.65),
    "core_attn": (selective("core_attn"), 0.95),
    "layernorm": (selective("layernorm"), 0.95),
    "mlp": (selective("mlp"), 0.7),
    "core_attn, layernorm and mlp": (selective("core_attn", "layernorm", "mlp"), 0.55),
}
SPARSE = {
    "moe": (selective("moe"), 0.75),
    "shared_experts": (selective("shared_experts"), 0.95),
    "full, with experts": (full("uniform", 1), 0.3),
}
COMPRESSED = {
    "mla_up_proj": (selective("mla_up_proj"), 0.97),
    "mla_up_proj, core_attn and layernorm": (
        selective("mla_up_proj", "core_attn", "layernorm"),
        0.65,
    ),
    "full, with latent attention": (full("uniform", 1), 0.15),
}
EXACT = {name for name in DENSE if name.startswith("full")}


class Kept:
    """Counts the bytes of activations that autograd keeps until the end of a forward pass."""

    def __init__(self, parameters):
        self.known = {p.untyped_storage().data_ptr() for p in parameters}
        self.kept = {}
        self.most = 0

    def __call__(self, tensor):
        self.kept[id(tensor.untyped_storage())] = tensor.detach()
        return tensor

    def end_of_forward(self, *_):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.kept.values()}
        sizes = [s.nbytes() for pointer, s in storages.items() if pointer not in self.known]
        self.most = max(self.most, sum(sizes))


def train_once(overrides):
    """Return loss, gradients and kept bytes of one step with one micro-batch a rank."""
    engine = Engine.from_config(
        tiny_config("train.micro_batch_size=2", "train.global_batch_size=2", *overrides)
    )
    kept = Kept(engine.model[0].parameters())
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 128, (2, 33), generator=generator)
    batch = {
        "tokens": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": torch.ones(2, 32),
        "position_ids": torch.arange(32).expand(2, -1),
    }
    engine.model[0].register_forward_hook(kept.end_of_forward)
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        loss = float(engine.forward_backward([batch]).loss)
    gradients = {
        name: parameter.main_grad.clone()
        for chunk in engine.model
        for name, parameter in chunk.named_parameters()
    }
    engine.close()
    return loss, gradients, kept.most


def train_all(cases):
    return [train_once(case) for case in cases]


@pytest.fixture(scope="module")
def dense():
    cases = [DROPOUT, *(DROPOUT + overrides for overrides, _ in DENSE.values())]
    return dict(zip(["none", *DENSE], run_ranks(train_all, 1, cases)[0], strict=True))


@pytest.fixture(scope="module")
def sparse():
    common = [*DROPOUT, *EXPERTS]
    cases = [common, *(common + overrides for overrides, _ in SPARSE.values())]
    return dict(zip(["none", *SPARSE], run_ranks(train_all, 1, cases)[0], strict=True))


@pytest.fixture(scope="module")
def compressed():
    common = [*DROPOUT, *LATENT]
    cases = [common, *(common + overrides for overrides, _ in COMPRESSED.values())]
    return dict(zip(["none", *COMPRESSED], run_ranks(train_all, 1, cases)[0], strict=True))


def assert_same_gradients(mine, reference, *, exact):
    assert mine[0] == pytest.approx(reference[0], abs=0.0 if exact else 1e-6)
    assert mine[1].keys() == reference[1].keys()
    largest = max(float(g.abs().max()) for g in reference[1].values())
    assert largest > 1e-3
    for name, gradient in reference[1].items():
        if exact:
            assert torch.equal(mine[1][name], gradient), name
        torch.testing.assert_close(mine[1][name], gradient, rtol=0, atol=1e-6 * largest)


@pytest.mark.dist
@pytest.mark.parametrize("name", DENSE)
def test_dense_layers(dense, name):
    assert_same_gradients(dense[name], dense["none"], exact=name in EXACT)
    share = dense[name][2] / dense["none"][2]
    assert share < DENSE[name][1], f"kept {share:.2f} of what is kept without recomputation"


@pytest.mark.dist
@pytest.mark.parametrize("name", SPARSE)
def test_layers_of_experts(sparse, name):
    assert_same_gradients(sparse[name], sparse["none"], exact=False)
    share = sparse[name][2] / sparse["none"][2]
    assert share < SPARSE[name][1], f"kept {share:.2f} of what is kept without recomputation"


@pytest.mark.dist
@pytest.mark.parametrize("name", COMPRESSED)
def test_layers_of_latent_attention(compressed, name):
    assert_same_gradients(compressed[name], compressed["none"], exact=False)
    share = compressed[name][2] / compressed["none"][2]
    assert share < COMPRESSED[name][1], f"kept {share:.2f} of what is kept without recomputation"


@pytest.mark.dist
def test_pipeline_stages():
    cases = [
        [*DROPOUT, *PP2],
        [*DROPOUT, *PP2, *full("uniform", 1)],
        [*DROPOUT, *PP2, *full("block", 1)],
        [*DROPOUT, *PP2, *selective("core_attn", "mlp")],
    ]
    for rank in run_ranks(train_all, 2, cases):
        for case in rank[1:]:
            assert_same_gradients(case, rank[0], exact=False)
            assert case[2] < rank[0][2]


@pytest.mark.dist
def test_dropout_was_on(dense):
    plain = run_ranks(train_all, 1, [[]])[0][0]
    assert abs(plain[0] - dense["none"][0]) > 1e-4
