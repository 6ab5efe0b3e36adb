# SPDX-License-Identifier: Apache-2.0
"""The same training on a GPU over NCCL as on a CPU over gloo, and Transformer Engine against torch."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from mb_engine import Engine
from mb_engine.testing import run_ranks, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)
STEPS = 20
CUDA = ["dist.device=cuda", "model.megatron.use_cpu_initialization=true"]


def train(overrides):
    """Return the losses of 20 steps on one repeated batch, and what was loaded after a save."""
    config = tiny_config(
        "train.train_iters=20",
        "optimizer.lr=3e-3",
        "optimizer.adam_eps=1e-5",
        "scheduler.lr_decay_style=constant",
        *overrides,
    )
    engine = Engine.from_config(config)
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (8, 33), generator=generator)
    batches = [
        {
            "tokens": ids[row : row + 2, :-1],
            "labels": ids[row : row + 2, 1:],
            "loss_mask": torch.ones(2, 32),
            "position_ids": torch.arange(32).expand(2, -1),
        }
        for row in range(0, 8, 2)
    ]
    losses = []
    for _ in range(STEPS):
        losses.append(float(engine.forward_backward(batches).loss))
        engine.optimizer_step()
    devices = {s.data.device.type for s in engine.state()["model"]}
    text = engine.generate([1, 2, 3], 4, temperature=0)
    engine.close()
    return losses, devices, len(text)


def losses_of(*overrides):
    losses, devices, length = run_ranks(train, 1, list(overrides), timeout_s=300)[0]
    assert devices == ({"cuda"} if "dist.device=cuda" in overrides else {"cpu"})
    assert length == 7
    return losses


def test_a_gpu_gives_the_losses_of_a_cpu_in_float32():
    """Kernels add in another order: 1e-4 over 20 steps is some hundred float32 roundings."""
    cpu = losses_of()
    cuda = losses_of(*CUDA, "model.layer_spec=torch")
    assert cuda == pytest.approx(cpu, abs=1e-4)
    assert cuda[-1] < cuda[0] - 0.5


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_bfloat16_follows_float32(distributed):
    """Bfloat16 has 8 bits of precision: 0.05 at a loss of 5 is one percent."""
    spec = "model.layer_spec=torch"
    full = losses_of(*CUDA, spec)
    mixed = losses_of(
        *CUDA,
        spec,
        "mixed_precision=bf16_mixed",
        f"optimizer.use_distributed_optimizer={distributed}",
    )
    assert mixed == pytest.approx(full, abs=0.05)


def test_float16_skips_overflowing_steps_and_learns():
    losses = losses_of(
        *CUDA,
        "model.layer_spec=torch",
        "mixed_precision=fp16_mixed",
        "optimizer.initial_loss_scale=65536",
    )
    assert losses[-1] < losses[0] - 0.3


@needs_te
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_transformer_engine_gives_the_losses_of_torch(precision):
    """Both specs hold the same weights; the bound is that of the precision."""
    bound = 2e-3 if precision == "fp32" else 0.05
    torch_spec = losses_of(*CUDA, "model.layer_spec=torch", f"mixed_precision={precision}")
    te_spec = losses_of(*CUDA, "model.layer_spec=te", f"mixed_precision={precision}")
    assert te_spec == pytest.approx(torch_spec, abs=bound)


@needs_te
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU with FP8",
)
@pytest.mark.parametrize(
    "recipe", ["bf16_with_fp8_current_scaling_mixed", "bf16_with_fp8_delayed_scaling_mixed"]
)
def test_fp8_follows_bfloat16(recipe):
    """FP8 has 2 to 3 bits of mantissa in its products: 0.2 at a loss of 5 is four percent."""
    base = losses_of(*CUDA, "model.layer_spec=te", "mixed_precision=bf16_mixed")
    fp8 = losses_of(*CUDA, "model.layer_spec=te", f"mixed_precision={recipe}")
    assert fp8 == pytest.approx(base, abs=0.2)
