# SPDX-License-Identifier: Apache-2.0
"""What the tests of several packages together share: a small job and the command line."""

import os
import subprocess
import sys

import pytest

SMALL_JOB = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2,
        seq_length: 32, make_vocab_size_divisible_by: 8}
train: {micro_batch_size: 2, global_batch_size: 4, train_iters: 4}
dataset: {type: text, path: ["pydoc:topics"], split: "90,10,0"}
logger: {log_interval: 1}
dist: {device: cpu}
"""


@pytest.fixture
def job(tmp_path):
    """A folder with ``job.yaml`` in it."""
    (tmp_path / "job.yaml").write_text(SMALL_JOB)
    return tmp_path


@pytest.fixture
def mb_train(job):
    """Run ``mb-train`` in the job's folder; returns the finished process."""

    def run(*arguments, env=None, timeout=240):
        return subprocess.run(
            [sys.executable, "-m", "mb_engine.cli", *arguments],
            cwd=job,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
