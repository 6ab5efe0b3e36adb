# SPDX-License-Identifier: Apache-2.0
"""Attention against explicit softmax in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from mb_engine.errors import EngineError
from mb_engine.testing import tiny_config

LENGTH, BATCH, HEAD = 12, 3, 16


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    from mb_engine.runtime.distributed import initialize, shutdown
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config().finalize(1)
    seed_everything(config.rng, initialize(config))
    yield
    shutdown()


def attention(*overrides, layer_number=1, mask="causal", **arguments):
    from mb_engine.model.attention import TorchAttention
    from mb_engine.model.gpt import transformer_config
    from megatron.core.transformer.enums import AttnMaskType

    config = transformer_config(tiny_config(*overrides).finalize(1))
    return TorchAttention(config, layer_number, AttnMaskType[mask], "self", **arguments)


def inputs(groups=2, keys=LENGTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def make(length, heads):
        x = torch.randn(length, BATCH, heads, HEAD, generator=generator)
        return x.to(dtype).requires_grad_()

    return make(LENGTH, 4), make(keys, groups), make(keys, groups)


def explicit(q, k, v, visible, scale):
    """Return softmax attention, with loops over heads and in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    outputs = []
    for head in range(q.size(2)):
        group = head * k.size(2) // q.size(2)
        scores = torch.einsum("sbd,tbd->bst", q[:, :, head], k[:, :, group]) * scale
        probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("bst,tbd->sbd", probabilities, v[:, :, group]))
    return torch.stack(outputs, dim=2).flatten(2), (q, k, v)


CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()
DISTANCE = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]

CASES = {
    "causal, grouped": ([], {}, 2, CAUSAL, 0.25),
    "causal, one group": (["model.num_query_groups=1"], {}, 1, CAUSAL, 0.25),
    "causal, a group a head": (["model.num_query_groups=4"], {}, 4, CAUSAL, 0.25),
    "own scale": ([], {"softmax_scale": 0.7}, 2, CAUSAL, 0.7),
    "window": (["model.window_size=[3, 0]"], {}, 2, CAUSAL & (DISTANCE <= 3), 0.25),
    "window, this layer without": (
        ["model.window_size=[3, 0]", "model.window_attn_skip_freq=2"],
        {"layer_number": 2},
        2,
        CAUSAL,
        0.25,
    ),
    "both ways": ([], {"mask": "no_mask"}, 2, torch.ones(LENGTH, LENGTH).bool(), 0.25),
    "both ways in a window": (
        ["model.window_size=[3, 2]"],
        {"mask": "no_mask"},
        2,
        (DISTANCE <= 3) & (DISTANCE >= -2),
        0.25,
    ),
    "unfused kernel": (["model.attention_backend=unfused"], {}, 2, CAUSAL, 0.25),
    "local kernel": (["model.attention_backend=local"], {}, 2, CAUSAL, 0.25),
    "flash kernel": (["model.attention_backend=flash"], {}, 2, CAUSAL, 0.25),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_explicit_softmax(case):
    overrides, arguments, groups, visible, scale = CASES[case]
    core = attention(*overrides, **arguments)
    q, k, v = inputs(groups)
    expected, exact = explicit(q, k, v, visible, scale)
    found = core(q, k, v)
    assert found.shape == (LENGTH, BATCH, 4 * HEAD)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.backward(grad)
    expected.backward(grad.double())
    for x, reference in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-4, atol=2e-6)


def test_a_mask_hides_keys_on_top_of_causality():
    hidden = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    hidden[1, 0, 5:, 2] = True
    q, k, v = inputs()
    expected, _ = explicit(q, k, v, CAUSAL & ~hidden[:, 0], 0.25)
    torch.testing.assert_close(
        attention()(q, k, v, hidden).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_fewer_queries_than_keys_are_the_last_ones():
    q, k, v = inputs(keys=LENGTH + 5)
    visible = torch.ones(LENGTH, LENGTH + 5).tril(5).bool()
    expected, _ = explicit(q, k, v, visible, 0.25)
    torch.testing.assert_close(attention()(q, k, v).double(), expected, rtol=1e-5, atol=1e-6)


def test_16_bit_inputs_give_16_bit_outputs_within_their_rounding():
    q, k, v = inputs(dtype=torch.bfloat16)
    expected, _ = explicit(q, k, v, CAUSAL, 0.25)
    found = attention()(q, k, v)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def test_the_window_mask_is_megatron_cores():
    from mb_engine.model.attention import visible_keys
    from megatron.core.transformer.utils import get_sliding_window_causal_mask

    for window in ((3, 0), (0, 0), (30, 0)):
        ours = visible_keys(7, 11, causal=True, window=window, device=torch.device("cpu"))
        theirs = get_sliding_window_causal_mask(7, 11, window)
        assert torch.equal(ours, ~theirs)


def test_dropout_is_off_in_evaluation():
    core = attention("model.attention_dropout=0.5")
    q, k, v = inputs()
    assert not torch.equal(core(q, k, v), core(q, k, v))
    core.eval()
    expected, _ = explicit(q, k, v, CAUSAL, 0.25)
    torch.testing.assert_close(core(q, k, v).double(), expected, rtol=1e-5, atol=1e-6)


def test_what_it_cannot_compute_is_refused_in_one_line():
    q, k, v = inputs()
    with pytest.raises(EngineError, match=r"packed_seq_params from PackedSequences.*not object"):
        attention()(q, k, v, packed_seq_params=object())
    with pytest.raises(EngineError, match="no kernel for attention_bias"):
        attention()(q, k, v, attention_bias=torch.zeros(1))
    with pytest.raises(EngineError, match=r"vanilla softmax only.*softmax_type=off-by-one"):
        attention("model.megatron.softmax_type=off-by-one")
    with pytest.raises(EngineError, match=r"attention_backend=fused: torch has no such kernel on"):
        attention("model.attention_backend=fused")(q, k, v)
    with pytest.raises(EngineError, match=r"=flash: .* attention_dropout=0.5.*backend=auto"):
        attention("model.attention_backend=flash", "model.attention_dropout=0.5")(q, k, v)
    with pytest.raises(EngineError, match=r"attn_logit_softcapping has no kernel for attention_ba"):
        attention("model.attention_backend=flash", "model.attn_logit_softcapping=2.0")(q, k, v)
