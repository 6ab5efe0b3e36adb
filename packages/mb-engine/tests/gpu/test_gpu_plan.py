# SPDX-License-Identifier: Apache-2.0
"""Planned peak memory is what the allocator of a GPU saw at most.

Tolerance: 10 %, for what is an estimate of the planner: what kernels need while they run.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from mb_engine import Engine
from mb_engine.plan import plan
from mb_engine.testing import run_ranks, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)
TOLERANCE = 0.1
STEPS = 3
# Large enough for activations and state to outweigh what libraries keep for themselves.
SHAPE = (
    "dist.device=cuda",
    "mixed_precision=bf16_mixed",
    "model.num_layers=8",
    "model.hidden_size=2048",
    "model.num_attention_heads=16",
    "model.num_query_groups=4",
    "model.ffn_hidden_size=5632",
    "model.seq_length=2048",
    "model.vocab_size=32000",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
)
FULL = (
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
)
GPT2 = (
    "model.normalization=LayerNorm",
    "model.add_bias_linear=true",
    "model.gated_linear_unit=false",
    "model.activation_func=gelu",
    "model.hidden_dropout=0.1",
)
EXPERTS = ("model.num_moe_experts=4", "model.moe_token_dispatcher_type=alltoall")
SPECS = [
    pytest.param("model.layer_spec=torch", id="torch"),
    pytest.param("model.layer_spec=te", id="te", marks=needs_te),
]


def peak_bytes(overrides):
    """Return the most memory that tensors took in a few steps on this rank's device."""
    engine = Engine.from_config(tiny_config(*overrides))
    config, device = engine.config, torch.device(engine.layout.device)
    rows, length = config.train.micro_batch_size, config.model.seq_length
    ids = torch.randint(0, config.model.vocab_size, (rows, length), device=device)
    batch = {
        "tokens": ids,
        "labels": ids,
        "loss_mask": torch.ones(rows, length, device=device),
        "position_ids": torch.arange(length, device=device).expand(rows, -1),
    }
    for _ in range(STEPS):
        engine.forward_backward([batch] * config.train.num_microbatches)
        engine.optimizer_step()
    peak = torch.cuda.max_memory_allocated(device)
    engine.close()
    return peak


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "overrides",
    [(), FULL, GPT2, EXPERTS, ("optimizer.use_distributed_optimizer=true",)],
    ids=["dense", "full recomputation", "GPT-2", "MoE", "distributed optimizer"],
)
def test_is_the_peak_of_the_allocator(spec, overrides):
    chosen = [*SHAPE, spec, *overrides]
    planned = plan(tiny_config(*chosen), world_size=1).peak_bytes
    measured = run_ranks(peak_bytes, 1, chosen, timeout_s=300)[0]
    assert planned == pytest.approx(measured, rel=TOLERANCE)
