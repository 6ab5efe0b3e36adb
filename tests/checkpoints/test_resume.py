# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed is the run that was never interrupted, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mb_ckpt import CheckpointStore

WORKER = Path(__file__).with_name("resume_worker.py")
CONFIG = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2,
        seq_length: 32, make_vocab_size_divisible_by: 8, hidden_dropout: 0.1,
        attention_dropout: 0.1}
train: {micro_batch_size: 2, global_batch_size: 8, train_iters: 40}
optimizer: {lr: 1.0e-2, min_lr: 1.0e-3}
scheduler: {lr_decay_style: cosine, lr_warmup_iters: 5}
dataset: {type: text, path: ["pydoc:topics"], split: "90,10,0"}
checkpoint: {save_interval: 20}
logger: {log_interval: 1, sinks: [jsonl]}
dist: {device: cpu}
"""
LAYOUTS = {
    "tp2_sp": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "dp2_distributed_optimizer": [
        "optimizer.use_distributed_optimizer=true",
        "ddp.overlap_grad_reduce=true",
        "ddp.overlap_param_gather=true",
    ],
    "dp2_fp16": [
        "mixed_precision=fp16_mixed",
        "optimizer.use_distributed_optimizer=true",
        "optimizer.initial_loss_scale=1048576",
        "optimizer.loss_scale_window=7",
    ],
    "pp2_bf16": ["model.pipeline_model_parallel_size=2", "mixed_precision=bf16_mixed"],
}


def start(folder, *, stop_at, overrides):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
            str(WORKER),
            str(folder),
            str(stop_at),
            f"checkpoint.save={folder}/checkpoints",
            f"logger.log_dir={folder}",
            *overrides,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder, *overrides):
    process = start(folder, stop_at=0, overrides=overrides)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def run_and_kill(folder, *overrides):
    """Kill -9 every rank and the launcher once step 25 is done and step 20 is durable."""
    process = start(folder, stop_at=25, overrides=overrides)
    deadline = time.monotonic() + 240
    while not (folder / "kill_me").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run never came to step 25"
        time.sleep(0.05)
    for pid_file in folder.glob("pid_*"):
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def losses(folder):
    with (folder / "metrics.jsonl").open() as lines:
        steps = [e for e in map(json.loads, lines) if e["kind"] == "step"]
    return {e["step"]: (e["loss"], e["grad_norm"], e["learning_rate"]) for e in steps}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, layout):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG)
    run(whole, *LAYOUTS[layout])
    run_and_kill(broken, *LAYOUTS[layout])
    run(broken, *LAYOUTS[layout], f"checkpoint.load={broken}/checkpoints")
    expected, seen = losses(whole), losses(broken)
    assert len(expected) == 40
    assert {s: seen[s] for s in range(21, 41)} == {s: expected[s] for s in range(21, 41)}
    assert_same_tensors(whole, broken)


def stored(folder):
    """Return every tensor of the last step as bytes, read on one rank without the engine."""
    store = CheckpointStore(folder / "checkpoints")
    state = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        for name, tensor in store.inspect(40).tensors.items()
    }
    store.load(state, 40)
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in state.items()}


def assert_same_tensors(a, b):
    expected, seen = stored(a), stored(b)
    assert expected.keys() == seen.keys()
    assert any(name.startswith("optimizer.exp_avg_sq") for name in seen)
    for name, content in expected.items():
        assert torch.equal(content, seen[name]), f"{name} differs after the resume"
