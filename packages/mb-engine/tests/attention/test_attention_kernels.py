# SPDX-License-Identifier: Apache-2.0
"""Kernels for windows, caps and packed rows against the formula written out in float64.

Tolerance: 1e-12 absolute, some thousand float64 roundings (1e-16) of numbers near 1.
"""

from __future__ import annotations

import pytest
import torch
from mb_engine.errors import EngineError
from mb_engine.testing import tiny_config

HEADS, WIDTH, SCALE = 4, 8, 0.3
EXACTLY = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    from mb_engine.runtime.distributed import initialize, shutdown
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config().finalize(1)
    seed_everything(config.rng, initialize(config))
    yield
    shutdown()


def inputs(queries, keys, *, groups=2, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(queries + keys)

    def make(length, heads):
        x = torch.randn(length, batch, heads, WIDTH, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    return make(queries, HEADS), make(keys, groups), make(keys, groups)


def formula(q, k, v, visible, cap=None):
    """Return attention by explicit softmax, one head at a time, in float64."""
    outputs = []
    for head in range(q.size(2)):
        group = head * k.size(2) // q.size(2)
        scores = torch.einsum("sbd,tbd->bst", q[:, :, head].double(), k[:, :, group].double())
        scores = scores * SCALE
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("bst,tbd->sbd", weights, v[:, :, group].double()))
    return torch.stack(outputs, dim=2)


def mask(queries, keys, left=None, right=0):
    """Return who sees whom, queries being the last of the keys."""
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)[None, :]
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if right is not None:
        visible &= distance >= -right
    return visible if left is None else visible & (distance <= left)


def check(found, expected, leaves, **tolerance):
    """Compare outputs and the gradients of *leaves*."""
    torch.testing.assert_close(found.double(), expected, **tolerance)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(9)).double()
    wanted = torch.autograd.grad(expected, leaves, upstream, retain_graph=True)
    assert wanted[-1].abs().max() > 1e-2
    grads = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
    for grad, reference in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), reference.double(), **tolerance)


WINDOWS = {
    "causal": ({}, {}),
    "causal window": ({"window": (5, 0)}, {"left": 5}),
    "only oneself": ({"window": (0, 0)}, {"left": 0}),
    "both ways": ({"causal": False}, {"right": None}),
    "window both ways": ({"causal": False, "window": (6, 3)}, {"left": 6, "right": 3}),
    "window without an end": ({"causal": False, "window": (6, -1)}, {"left": 6, "right": None}),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("queries", [40, 23])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_the_exact_kernel_computes_the_formula_in_steps(window, queries, cap, monkeypatch):
    from mb_engine.model.attention import exact
    from mb_engine.model.attention.scoring import Scoring

    settings, seen = WINDOWS[window]
    # 16 rows at a time, which neither 40 nor 23 is a multiple of.
    monkeypatch.setattr(exact, "_ELEMENTS", 1)
    q, k, v = inputs(queries, 40)
    found = exact.exact_attention(q, k, v, Scoring(scale=SCALE, cap=cap, **settings))
    expected = formula(q, k, v, mask(queries, 40, **seen), cap)
    check(found, expected, (q, k, v), **EXACTLY)


def test_the_exact_kernel_rounds_16_bits_once():
    from mb_engine.model.attention.exact import exact_attention
    from mb_engine.model.attention.scoring import Scoring

    q, k, v = inputs(24, 24, dtype=torch.bfloat16)
    found = exact_attention(q, k, v, Scoring(scale=SCALE, cap=2.0))
    assert found.dtype == torch.bfloat16
    expected = formula(q, k, v, mask(24, 24), cap=2.0)
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("left", [3, 30])
@pytest.mark.parametrize("queries", [70, 51])
def test_a_window_is_computed_in_bands(left, queries, monkeypatch):
    from mb_engine.model.attention import local
    from mb_engine.model.attention.scoring import Scoring

    monkeypatch.setattr(local, "_BAND_ROWS", 8)
    seen = []
    by_torch = local._by_torch
    monkeypatch.setattr(
        local, "_by_torch", lambda q, k, *rest: seen.append(k.size(0)) or by_torch(q, k, *rest)
    )
    q, k, v = inputs(queries, 70)
    found = local.attend(q, k, v, Scoring(scale=SCALE, window=(left, 0)))
    assert len(seen) > 1
    assert max(seen) <= max(8, left + 1) + left, "no band may see more than its window reaches"
    check(found, formula(q, k, v, mask(queries, 70, left)), (q, k, v), **EXACTLY)


class TestPacked:
    LENGTHS = (5, 1, 12, 6)

    def packed(self, lengths=LENGTHS):
        from mb_engine.model.attention import PackedSequences
        from mb_engine.parallel.sequence import Packing

        packing = Packing(lengths=lengths, max_length=max(lengths))
        return PackedSequences.of(packing, device=torch.device("cpu"))

    def visible(self):
        sample = torch.arange(4).repeat_interleave(torch.tensor(self.LENGTHS))
        return (sample[:, None] == sample[None, :]) & mask(24, 24)

    def attention(self, *overrides):
        from mb_engine.model.attention import TorchAttention
        from mb_engine.model.gpt import transformer_config
        from megatron.core.transformer.enums import AttnMaskType

        config = transformer_config(tiny_config(*overrides).finalize(1))
        return TorchAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=SCALE)

    @pytest.mark.parametrize(
        ("overrides", "left", "cap"),
        [
            ([], None, None),
            (["model.window_size=[3, 0]"], 3, None),
            (["model.attn_logit_softcapping=0.7"], None, 0.7),
            (["model.attn_logit_softcapping=0.7", "model.window_size=[3, 0]"], 3, 0.7),
            (["model.attention_backend=unfused"], None, None),
        ],
    )
    def test_samples_attend_to_themselves_alone(self, overrides, left, cap):
        q, k, v = inputs(24, 24, batch=1)
        found = self.attention(*overrides)(q, k, v, packed_seq_params=self.packed())
        visible = self.visible() & mask(24, 24, left)
        check(found.view(q.shape), formula(q, k, v, visible, cap), (q, k, v), **EXACTLY)

    def test_takes_rows_without_a_batch_as_megatron_core_hands_them(self):
        q, k, v = inputs(24, 24, batch=1)
        core, packed = self.attention(), self.packed()
        expected = core(q, k, v, packed_seq_params=packed)
        found = core(*(x.squeeze(1) for x in (q, k, v)), packed_seq_params=packed)
        assert torch.equal(found, expected)

    def test_another_sample_changes_no_bit(self):
        core, packed = self.attention(), self.packed()
        q, k, v = inputs(24, 24, batch=1, dtype=torch.float32)
        before = core(q, k, v, packed_seq_params=packed).detach()
        with torch.no_grad():
            for x in (q, k, v):
                x[6:18] += 1.0
        after = core(q, k, v, packed_seq_params=packed).detach()
        outside = [*range(6), *range(18, 24)]
        assert torch.equal(before[outside], after[outside])
        assert not torch.equal(before[6:18], after[6:18])

    def test_a_mask_on_top_is_refused(self):
        q, k, v = inputs(24, 24, batch=1)
        with pytest.raises(EngineError, match="packed samples have no attention_mask"):
            self.attention()(q, k, v, self.visible(), packed_seq_params=self.packed())


class TestBoundaries:
    def read(self, boundaries, *, tokens=12, rows=1, cp=1, **entries):
        from mb_engine.parallel.sequence import read_packing

        batch = {"tokens": torch.zeros(rows, tokens), "cu_seqlens": torch.tensor(boundaries)}
        return read_packing(batch | entries, cp=cp)

    def test_say_how_long_each_sample_is(self):
        found = self.read([0, 4, 4, 12])
        assert (found.lengths, found.max_length) == ((4, 8), 8)
        assert self.read([[0, 12]], max_seqlen=torch.tensor([32])).max_length == 32

    def test_are_not_asked_of_a_batch_without_them(self):
        from mb_engine.parallel.sequence import read_packing

        assert read_packing({"tokens": torch.zeros(2, 3)}) is None

    @pytest.mark.parametrize(
        ("boundaries", "entries", "says"),
        [
            ([0, 4, 11], {}, r"\[0, 4, 11\].*rise from 0 to its length"),
            ([1, 12], {}, "from 0"),
            ([0, 8, 4, 12], {}, "rise"),
            ([], {}, "rise"),
            ([0, 12], {"rows": 2}, r"tokens \[2, 12\].*one row"),
            ([0, 6, 12], {"cp": 2}, r"has 6 tokens.*multiple of 4; pad it to 8"),
            ([0, 12], {"max_seqlen": 8}, r"max_seqlen'\]=8: a sample of this row has 12"),
        ],
    )
    def test_that_do_not_fit_are_refused(self, boundaries, entries, says):
        with pytest.raises(EngineError, match=says):
            self.read(boundaries, **entries)
