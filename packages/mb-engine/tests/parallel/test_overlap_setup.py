# SPDX-License-Identifier: Apache-2.0
"""What overlapping communication is set up with, and that aligned gathers change no number."""

from __future__ import annotations

import enum
import types

import pytest
import torch
from mb_config.errors import UserError
from mb_engine import Engine
from mb_engine.parallel.overlap import initialize_overlap, user_buffer_arguments
from mb_engine.precision.quantized import is_quantized
from mb_engine.testing import run_ranks, tiny_config
from packaging.version import Version


class Modes(enum.Enum):
    NONE, FP8 = 1, 2


BASE = types.SimpleNamespace(UserBufferQuantizationMode=Modes)
TP2 = [
    "dist.device=auto",
    "model.tensor_model_parallel_size=2",
    "model.sequence_parallel=true",
    "comm_overlap.tp_comm_overlap=true",
]


def arguments(version, *overrides):
    config = tiny_config(*TP2, *overrides).finalize(2)
    return user_buffer_arguments(config, BASE, Version(version))


def test_user_buffers_have_the_shape_of_a_whole_micro_batch():
    made = arguments("2.9", "comm_overlap.tp_comm_overlap_cfg={qkv_fprop: {num_sm: 4}}")
    assert made == {
        "shape": [32 * 2, 64],
        "tp_size": 2,
        "ub_cfgs": {"qkv_fprop": {"num_sm": 4}},
        "bootstrap_backend": "nccl",
        "quantization_modes": [Modes.NONE],
    }


def test_user_buffers_know_of_fp8():
    current = "mixed_precision=bf16_with_fp8_current_scaling_mixed"
    delayed = "mixed_precision=bf16_with_fp8_delayed_scaling_mixed"
    assert arguments("2.9", delayed)["quantization_modes"] == [Modes.FP8]
    # Its layers at both ends stay in bfloat16 and need buffers of that.
    assert arguments("2.9", current)["quantization_modes"] == [Modes.FP8, Modes.NONE]
    assert arguments("2.6", current)["use_fp8"] is True
    assert arguments("2.6")["use_fp8"] is False


def refuse():
    from mb_engine.runtime.megatron_compat import prepare_megatron
    from mb_engine.runtime.megatron_cpu import install

    install()
    prepare_megatron()
    with pytest.raises(UserError, match=r"tp_comm_overlap=True: needs Transformer Engine layers"):
        initialize_overlap(tiny_config(*TP2).finalize(2))
    initialize_overlap(tiny_config().finalize(1))  # nothing to set up
    return is_quantized(torch.ones(2))


@pytest.mark.dist
def test_overlap_by_transformer_engine_is_refused_without_its_layers():
    assert run_ranks(refuse, 1) == [False]


LAYOUT = [
    "model.pipeline_model_parallel_size=2",
    "model.virtual_pipeline_model_parallel_size=2",
]
OVERLAP = [
    "optimizer.use_distributed_optimizer=true",
    "ddp.overlap_grad_reduce=true",
    "ddp.overlap_param_gather=true",
    "ddp.bucket_size=4096",
]


def train(overrides):
    config = tiny_config(
        "train.train_iters=6",
        "optimizer.lr=3e-3",
        "optimizer.adam_eps=1e-5",
        "scheduler.lr_decay_style=constant",
        *overrides,
    )
    engine = Engine.from_config(config)
    dp, rank = engine.layout.dp, engine.layout.dp_rank
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 128, (8, 33), generator=generator)
    rows = [slice(at + rank * 2, at + rank * 2 + 2) for at in range(0, 8, 2 * dp)]
    batches = [
        {
            "tokens": ids[row, :-1].contiguous(),
            "labels": ids[row, 1:].contiguous(),
            "loss_mask": torch.ones(2, 32),
            "position_ids": torch.arange(32).expand(2, -1),
        }
        for row in rows
    ]
    losses = []
    for _ in range(6):
        losses.append(float(engine.forward_backward(batches).loss))
        engine.optimizer_step()
    aligned = engine.config.ddp.align_param_gather
    engine.close()
    return losses, aligned


def train_all(cases):
    return [train(case) for case in cases]


@pytest.mark.dist
def test_aligned_gathers_of_interleaved_stages_give_the_losses_of_one_rank():
    """Some float32 roundings in six steps: 1e-5."""
    (expected, _) = run_ranks(train_all, 1, [[]])[0][0]
    cases = [[*LAYOUT, *OVERLAP], [*LAYOUT, *OVERLAP, "ddp.align_param_gather=true"]]
    for rank in run_ranks(train_all, 4, cases):
        for (losses, aligned), wanted in zip(rank, (False, True), strict=True):
            assert aligned is wanted
            assert losses == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0]
