# SPDX-License-Identifier: Apache-2.0
"""Attention with windows in every other layer and capped scores, as Hugging Face's Gemma 2 has it."""

from __future__ import annotations

import pytest
import torch
from mb_engine.testing import tiny_config

transformers = pytest.importorskip("transformers")

HEADS, GROUPS, HEAD, LENGTH, WINDOW = 4, 2, 16, 32, 8
GEMMA = [
    "model.num_layers=2",
    # There a window counts the token itself, here the tokens before it.
    f"model.window_size=[{WINDOW - 1}, 0]",
    "model.window_attn_skip_freq=2",
    "model.attn_logit_softcapping=1.5",
    # 1 / sqrt(query_pre_attn_scalar)
    "model.megatron.softmax_scale=0.125",
]


@pytest.fixture(scope="module", autouse=True)
def layout():
    from mb_engine.runtime.distributed import initialize, shutdown

    yield initialize(tiny_config().finalize(1))
    shutdown()


def build(layout, *overrides):
    from mb_engine.model.gpt import build_model
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config(*overrides).finalize(1)
    seed_everything(config.rng, layout)
    return build_model(config, layout)[0]


def their_attention(index, cap):
    """Return Gemma 2's attention of layer *index* with random weights, and what it is called with."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.gemma2 import modeling_gemma2

    config = transformers.Gemma2Config(
        hidden_size=HEADS * HEAD,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD,
        query_pre_attn_scalar=64,
        attn_logit_softcapping=cap,
        sliding_window=WINDOW,
        attention_dropout=0.0,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
    )
    torch.manual_seed(4)
    module = modeling_gemma2.Gemma2Attention(config, layer_idx=index)
    with torch.no_grad():
        for parameter in module.parameters():
            # Scores as large as the cap, so that it bends them.
            parameter.normal_(std=0.3)
    local = config.layer_types[index] == "sliding_attention"
    positions = torch.arange(LENGTH)
    x_BSH = torch.randn(2, LENGTH, HEADS * HEAD)
    make_mask = create_sliding_window_causal_mask if local else create_causal_mask
    mask = make_mask(
        config=config,
        input_embeds=x_BSH,
        attention_mask=None,
        cache_position=positions,
        past_key_values=None,
    )
    rotary = modeling_gemma2.Gemma2RotaryEmbedding(config)
    embedding = rotary(x_BSH, positions[None])
    return module, x_BSH, {"position_embeddings": embedding, "attention_mask": mask}, local


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("cap", [1.5, None])
def test_attention_is_that_of_gemma_2(layout, index, cap):
    theirs, x_BSH, arguments, local = their_attention(index, cap)
    assert local == (index == 0)
    settings = GEMMA if cap else [*GEMMA, "model.attn_logit_softcapping=null"]
    model = build(layout, *settings)
    ours = model.decoder.layers[index].self_attention
    assert ours.core_attention.scoring.window == ((WINDOW - 1, 0) if local else None)
    q, k, v = (getattr(theirs, f"{x}_proj").weight.detach() for x in "qkv")
    by_group = [x.view(GROUPS, -1, x.size(-1)) for x in (q, k, v)]
    with torch.no_grad():
        ours.linear_qkv.weight.copy_(torch.cat(by_group, dim=1).flatten(0, 1))
        ours.linear_proj.weight.copy_(theirs.o_proj.weight)
    here, there = (x_BSH.clone().requires_grad_() for _ in range(2))
    expected, _ = theirs(there, **arguments)
    angles = model.rotary_pos_emb(LENGTH)
    found, _ = ours(here.transpose(0, 1), None, rotary_pos_emb=angles)
    found = found.transpose(0, 1)
    # Some float32 roundings of numbers near 1.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(expected.shape)
    expected.backward(upstream)
    found.backward(upstream)
    scale = there.grad.abs().max()
    assert (here.grad - there.grad).abs().max() < 1e-5 * scale


def test_final_logits_are_bent_and_the_loss_is_theirs(layout):
    cap = 0.05
    ids = torch.randint(0, 128, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    tokens, labels, positions = ids[:, :-1], ids[:, 1:], torch.arange(LENGTH).expand(2, -1)
    plain = build(layout, "model.num_layers=2")(tokens, positions, None).detach()
    model = build(layout, "model.num_layers=2", f"model.final_logit_softcapping={cap}")
    expected = cap * torch.tanh(plain.double() / cap)
    assert (plain - expected).abs().max() > 0.01, "the cap must bend"
    found = model(tokens, positions, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    losses = model(tokens, positions, None, labels=labels)
    wanted = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), labels.flatten(), reduction="none"
    )
    torch.testing.assert_close(losses.double().flatten(), wanted, rtol=1e-6, atol=1e-6)
    losses.sum().backward()
    assert model.output_layer.weight.grad.abs().max() > 0
