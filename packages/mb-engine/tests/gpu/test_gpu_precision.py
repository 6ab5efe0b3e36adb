# SPDX-License-Identifier: Apache-2.0
"""Devices, layer specs and precisions against each other on a GPU.

Bounds are of losses near 5 over 20 steps. Bfloat16 has 8 bits of precision: 0.05 is one percent.
FP8 has 3 bits of mantissa in its products and scales per tensor or block: 0.15 is three percent.
FP4 has 1 bit: 0.4 is eight percent. Each would be missed by an order of magnitude if scales were
applied to the wrong tensor, and the losses must fall in all of them.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gpu_training import BF16, CUDA, SHARDED, TE, TORCH, losses_of, run
from mb_config import MixedPrecisionConfig, precisions
from mb_engine.precision.support import SCALINGS, Machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)
BOUNDS = {
    "bf16_with_fp8_current_scaling_mixed": 0.15,
    "bf16_with_fp8_delayed_scaling_mixed": 0.15,
    "bf16_with_fp8_subchannel_scaling_mixed": 0.15,
    "bf16_with_mxfp8_mixed": 0.15,
    "bf16_with_nvfp4_mixed": 0.4,
}


@pytest.fixture(scope="module")
def bfloat16():
    """Losses of the TE spec in bfloat16."""
    return losses_of(*CUDA, *TE, *BF16)


def test_a_gpu_gives_the_losses_of_a_cpu_in_float32():
    """Kernels add in another order: 1e-4 over 20 steps is some hundred float32 roundings."""
    assert losses_of(*CUDA, *TORCH) == pytest.approx(losses_of(), abs=1e-4)


@pytest.mark.parametrize("sharded", [(), SHARDED], ids=["plain", "distributed optimizer"])
def test_bfloat16_follows_float32(sharded):
    full = losses_of(*CUDA, *TORCH)
    assert losses_of(*CUDA, *TORCH, *BF16, *sharded) == pytest.approx(full, abs=0.05)


def test_the_distributed_optimizer_over_nccl_is_the_plain_one():
    """One rank owns all: what differs is the flat copy, not a number."""
    plain = losses_of(*CUDA, *TORCH, *BF16)
    assert losses_of(*CUDA, *TORCH, *BF16, *SHARDED) == pytest.approx(plain, abs=1e-3)


def test_float16_skips_overflowing_steps_and_learns():
    done = run(
        *CUDA,
        *TORCH,
        "mixed_precision=fp16_mixed",
        "optimizer.initial_loss_scale=4294967296",
        "optimizer.hysteresis=1",
    )
    assert done["updates"] < 20
    assert done["scales"][-1] < done["scales"][0]
    assert done["losses"][-1] < done["losses"][0] - 0.1


@needs_te
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-3), ("bf16_mixed", 0.05)])
def test_transformer_engine_gives_the_losses_of_torch(precision, bound):
    """Both specs hold the same weights; TE computes float32 products in TF32, 10 bits."""
    mixed = f"mixed_precision={precision}"
    assert losses_of(*CUDA, *TE, mixed) == pytest.approx(losses_of(*CUDA, *TORCH, mixed), abs=bound)


@needs_te
@pytest.mark.parametrize("recipe", BOUNDS)
def test_low_precision_follows_bfloat16(recipe, bfloat16):
    section = precisions.find_precision(recipe)
    assert isinstance(section, MixedPrecisionConfig)
    missing = Machine.here().lacks(SCALINGS[section.fp8_recipe if section.fp8 else "nvfp4"])
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    overrides = [f"mixed_precision={recipe}"]
    if section.fp4:
        overrides.append("mixed_precision.fp4_param=false")
    low = losses_of(*CUDA, *TE, *overrides)
    assert low == pytest.approx(bfloat16, abs=BOUNDS[recipe])
    assert low != bfloat16, "it must really have computed in another precision"


@needs_te
def test_optimizer_states_in_16_bits_follow_those_in_float32(bfloat16):
    """Moments of 8 bits change updates by 0.4 percent each: 0.05, as for bfloat16 itself."""
    small = losses_of(
        *CUDA,
        *TE,
        *BF16,
        *SHARDED,
        "optimizer.use_precision_aware_optimizer=true",
        "optimizer.exp_avg_dtype=bfloat16",
        "optimizer.exp_avg_sq_dtype=bfloat16",
    )
    assert small == pytest.approx(bfloat16, abs=0.05)
