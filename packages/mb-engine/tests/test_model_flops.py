# SPDX-License-Identifier: Apache-2.0
"""Counted operations against torch's own counter on the model that is built."""

from __future__ import annotations

import pytest
import torch
from mb_engine.model.flops import flops_per_token, visible_keys_per_query
from mb_engine.testing import tiny_config
from torch.utils.flop_counter import FlopCounterMode

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
    hidden_keys = section.seq_length - visible_keys_per_query(section)
    width = section.num_attention_heads * section.kv_channels
    not_causal = 3 * section.num_layers * 2 * 2 * width * hidden_keys
    counted = counter.get_total_flops() / tokens.numel()
    assert counted == pytest.approx(flops_per_token(config) + not_causal, rel=1e-6)


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
