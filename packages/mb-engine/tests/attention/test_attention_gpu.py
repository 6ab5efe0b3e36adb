# SPDX-License-Identifier: Apache-2.0
"""Attention kernels of CUDA against the formula in float64, values and gradients.

The ring itself needs several GPUs; its kernels are checked here by hand-made steps of it: parts of
the keys are attended to one after the other, merged, and differentiated through the merged result.

Bounds: inputs of 16 bits are rounded before both sides see them, so that what differs is the
rounding of probabilities and outputs, 2**-8 relative each; float32 without TF32 rounds to 2**-23.
"""

from __future__ import annotations

import pytest
import torch
from mb_engine.errors import EngineError
from mb_engine.testing import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, GROUPS, WIDTH, SCALE = 8, 2, 64, 0.125
BOUNDS = {torch.bfloat16: 2**-5, torch.float16: 2**-7, torch.float32: 2**-16}
LENGTHS = (96, 32, 256, 128)


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    from mb_engine.runtime.distributed import initialize, shutdown
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config("dist.device=cuda").finalize(1)
    seed_everything(config.rng, initialize(config))
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    shutdown()


def inputs(dtype, *, queries=512, keys=512, batch=2):
    generator = torch.Generator().manual_seed(1)

    def make(length, heads):
        x = torch.randn(length, batch, heads, WIDTH, generator=generator)
        return x.to("cuda", dtype).requires_grad_()

    return make(queries, HEADS), make(keys, GROUPS), make(keys, GROUPS)


def formula(q, k, v, visible, cap=None):
    k, v = (x.double().repeat_interleave(HEADS // GROUPS, 2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q.double(), k) * SCALE
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, float("-inf"))
    out = torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1)


def distance(queries, keys):
    place = torch.arange(queries, device="cuda")[:, None] + (keys - queries)
    return place - torch.arange(keys, device="cuda")[None, :]


def check(found, expected, leaves):
    bound = BOUNDS[found.dtype]
    assert (found.double() - expected).abs().max() < bound
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(found)
    wanted = torch.autograd.grad(expected, leaves, upstream.double(), retain_graph=True)
    for grad, reference in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
        scale = reference.double().abs().max()
        assert (grad.double() - reference.double()).abs().max() < 2 * bound * scale


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("queries", "left", "cap"),
    [(512, None, None), (128, None, None), (512, 100, None), (512, 100, 2.0)],
)
def test_windows_caps_and_queries_at_the_end(dtype, queries, left, cap):
    from mb_engine.model.attention.local import attend
    from mb_engine.model.attention.scoring import Scoring

    q, k, v = inputs(dtype, queries=queries)
    window = None if left is None else (left, 0)
    found = attend(q, k, v, Scoring(scale=SCALE, window=window, cap=cap))
    far = distance(queries, 512)
    visible = far >= 0 if left is None else (far >= 0) & (far <= left)
    check(found, formula(q, k, v, visible, cap)[0], (q, k, v))


def packed_row(device="cuda"):
    from mb_engine.model.attention import PackedSequences
    from mb_engine.parallel.sequence import Packing

    packing = Packing(lengths=LENGTHS, max_length=512)
    return PackedSequences.of(packing, device=torch.device(device))


def same_sample():
    sizes = torch.tensor(LENGTHS)
    sample = torch.arange(len(LENGTHS)).repeat_interleave(sizes).cuda()
    return sample[:, None] == sample[None, :]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("left", [None, 40])
def test_packed_samples_attend_to_themselves_alone(dtype, left):
    from mb_engine.model.attention.local import attend_segments
    from mb_engine.model.attention.scoring import Scoring

    q, k, v = inputs(dtype, batch=1)
    scoring = Scoring(scale=SCALE, window=None if left is None else (left, 0))
    found = attend_segments(q, k, v, scoring, packed_row().segments(1, 1))
    far = distance(512, 512)
    visible = same_sample() & (far >= 0)
    if left is not None:
        visible &= far <= left
    check(found, formula(q, k, v, visible)[0], (q, k, v))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("packed", [False, True])
def test_parts_merge_to_the_whole_and_share_its_gradient(dtype, packed):
    """Both halves of the keys, one after the other, as the last rank of a ring sees them."""
    from mb_engine.model.attention.blocks import CUDA_FLASH, EXACT, block_kernel
    from mb_engine.model.attention.packed import Segments
    from mb_engine.model.attention.scoring import Scoring

    batch = 1 if packed else 2
    q, k, v = inputs(dtype, queries=256, batch=batch)
    segments, visible = None, torch.ones(256, 512, dtype=torch.bool, device="cuda")
    if packed:  # two samples; each half of the keys has half of both
        cu = torch.tensor([0, 128, 256], dtype=torch.int32, device="cuda")
        segments = Segments(queries=(128, 128), keys=(128, 128), cu_queries=cu, cu_keys=cu)
        row, column = torch.arange(256).cuda() // 128, torch.arange(512).cuda() // 128 % 2
        visible = row[:, None] == column[None, :]
    full = Scoring(scale=SCALE, causal=False)
    kernel = block_kernel(q, full, "auto")
    assert kernel is (EXACT if dtype == torch.float32 else CUDA_FLASH)
    halves = list(zip(k.detach().chunk(2), v.detach().chunk(2), strict=True))
    parts = [kernel.forward(q.detach(), *half, full, segments) for half in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part[1] - lse).exp().permute(2, 0, 1)[..., None] for part in parts]
    out = sum(w * part[0] for w, part in zip(weights, parts, strict=True)).to(dtype)
    expected, expected_lse = formula(q, k, v, visible)
    bound = BOUNDS[dtype]
    assert (lse - expected_lse).abs().max() < 2**-10
    assert (out.double() - expected).abs().max() < bound
    upstream = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, (q, k, v), upstream.double())
    grads = [
        kernel.backward(upstream, q.detach(), *half, out, lse, full, segments) for half in halves
    ]
    found = (
        grads[0][0] + grads[1][0],
        *(torch.cat(x) for x in zip(*(g[1:] for g in grads), strict=True)),
    )
    for grad, reference in zip(found, wanted, strict=True):
        scale = reference.double().abs().max()
        assert (grad.double() - reference.double()).abs().max() < 2 * bound * scale


def test_a_backend_that_cannot_is_refused_in_one_line():
    from mb_engine.model.attention.local import attend
    from mb_engine.model.attention.scoring import Scoring

    q, k, v = inputs(torch.float32)
    with pytest.raises(EngineError, match=r"attention_backend=flash: torch has no such kernel on"):
        attend(q, k, v, Scoring(scale=SCALE), backend="flash")
    found = attend(q, k, v, Scoring(scale=SCALE), backend="fused")
    check(found, formula(q, k, v, distance(512, 512) >= 0)[0], (q, k, v))
