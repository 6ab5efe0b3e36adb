# SPDX-License-Identifier: Apache-2.0
"""Counted operations against torch's own counter on the model that is built."""

from __future__ import annotations

import pytest
import torch
from mb_engine.model.flops import flops_per_token, visible_keys_per_query
from mb_engine.testing import tiny_config
from torch.utils.flop_counter import FlopCounterMode

LATENT = [
    "model.multi_latent_attention=true",
    "model.num_query_groups=null",
    "model.kv_lora_rank=16",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=12",
]
MODELS = {
    "grouped queries, gated": [],
    "a group a head, not gated": [
        "model.num_query_groups=4",
        "model.gated_linear_unit=false",
        "model.activation_func=gelu",
    ],
    "wide heads": ["model.kv_channels=32"],
    "experts": ["model.num_moe_experts=4", "model.moe_router_topk=2", "model.moe_layer_freq=[0,1]"],
    "a shared expert": [
        "model.num_moe_experts=4",
        "model.moe_router_topk=1",
        "model.moe_router_pre_softmax=true",
        "model.moe_shared_expert_intermediate_size=96",
        "model.moe_ffn_hidden_size=32",
    ],
    "a gated shared expert": [
        "model.num_moe_experts=4",
        "model.moe_shared_expert_intermediate_size=96",
        "model.moe_shared_expert_gate=true",
    ],
    "a window in one layer": ["model.window_size=[5, 0]", "model.window_attn_skip_freq=2"],
    "latent attention": LATENT,
    "latent attention, queries compressed": [*LATENT, "model.q_lora_rank=24"],
    "predictions ahead": ["model.mtp_num_layers=2"],
    "predictions ahead of experts": [
        *LATENT,
        "model.mtp_num_layers=1",
        "model.num_moe_experts=4",
        "model.moe_layer_freq=[0,1]",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def layout():
    from mb_engine.runtime.distributed import initialize, shutdown
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config().finalize(1)
    layout = initialize(config)
    seed_everything(config.rng, layout)
    yield layout
    shutdown()


@pytest.mark.parametrize("model", MODELS)
def test_operations_are_those_that_torch_counts(model, layout):
    from mb_engine.model.gpt import build_model

    # The unfused kernel shows its two products to the counter, over all keys of each query.
    overrides = ["model.num_layers=2", "model.attention_backend=unfused", *MODELS[model]]
    config = tiny_config(*overrides).finalize(1)
    (chunk,) = build_model(config, layout)
    tokens = torch.randint(0, 128, (2, 32))
    with FlopCounterMode(display=False) as counter:
        chunk(tokens, None, None, labels=tokens).sum().backward()
    section = config.model
    widths = section.kv_channels + (
        section.v_head_dim if section.multi_latent_attention else section.kv_channels
    )
    layers = section.num_layers + (section.mtp_num_layers or 0)
    hidden_keys = sum(
        section.seq_length - visible_keys_per_query(section, layer=i) for i in range(layers)
    )
    not_causal = 3 * 2 * section.num_attention_heads * widths * hidden_keys
    counted = counter.get_total_flops() / tokens.numel()
    assert counted == pytest.approx(flops_per_token(config) + not_causal, rel=1e-9)


def test_packed_samples_see_their_own_keys_alone():
    config = tiny_config("model.window_size=[3, 0]").finalize(1)
    lengths = [1, 20, 3, 8]
    sample = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    place = torch.arange(32)
    distance = place[:, None] - place[None, :]
    visible = (sample[:, None] == sample[None, :]) & (distance >= 0) & (distance <= 3)
    mean = visible.sum(1).double().mean().item()
    assert visible_keys_per_query(config.model, lengths) == mean
    config.model.window_size = None
    squares = sum(n * (n + 1) / 2 for n in lengths)
    assert visible_keys_per_query(config.model, lengths) == squares / 32
    width = config.model.num_attention_heads * config.model.kv_channels
    fewer_keys = visible_keys_per_query(config.model) - squares / 32
    saved = flops_per_token(config) - flops_per_token(config, lengths)
    assert saved == pytest.approx(3 * 2 * 2 * width * fewer_keys * config.model.num_layers)


@pytest.mark.parametrize("window", [None, (0, 0), (5, 0), (31, 0), (40, 0)])
def test_visible_keys_are_those_of_the_mask(window, layout):
    from mb_engine.model.attention import visible_keys

    config = tiny_config().finalize(1)
    config.model.window_size = window
    mask = visible_keys(32, 32, causal=True, window=window, device=torch.device("cpu"))
    assert visible_keys_per_query(config.model) == mask.sum(1).double().mean().item()


def test_the_rule_of_thumb_of_six_operations_a_parameter_holds_for_a_wide_model():
    config = tiny_config(
        "model.hidden_size=4096",
        "model.num_attention_heads=32",
        "model.num_query_groups=8",
        "model.ffn_hidden_size=14336",
        "model.num_layers=32",
        "model.vocab_size=128256",
        "model.seq_length=128",
    ).finalize(1)
    parameters = 7.5e9  # of Llama 3 8B, without the embedding, which is looked up
    assert flops_per_token(config) == pytest.approx(6 * parameters, rel=0.01)
