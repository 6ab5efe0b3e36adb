# SPDX-License-Identifier: Apache-2.0
"""The GPU suite and benchmark run on a CPU as far as they go, so that a typo is found here.

Their training runs in float32 on the torch spec; every configuration of the suite is resolved, and
each comparison is called with made-up losses.
"""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from mb_engine.precision.support import Machine
from mb_engine.testing import tiny_config
from packaging.version import Version

FOLDER = Path(__file__).parent
ROOT = Path(__file__).parents[4]
BLACKWELL = Machine(capability=(10, 0), engine=Version("2.9"), megatron=Version("0.19.2"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def training():
    yield load("gpu_training")
    del sys.modules["gpu_training"]


@pytest.mark.dist
def test_the_training_of_the_suite_runs(training):
    done = training.run(steps=2)
    assert len(done["losses"]) == 2
    assert done["losses"][1] < done["losses"][0]
    assert (done["updates"], done["scales"]) == (2, [1.0, 1.0])


def cases(function):
    """Yield the keyword arguments that pytest would call a test with."""
    axes = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names = mark.args[0] if isinstance(mark.args[0], tuple) else (mark.args[0],)
        values = [getattr(value, "values", (value,)) for value in mark.args[1]]
        rows = [v[0] if len(names) > 1 and isinstance(v[0], tuple) else v for v in values]
        axes.append([dict(zip(names, row, strict=True)) for row in rows])
    for combination in itertools.product(*axes):
        yield {name: value for row in combination for name, value in row.items()}


@pytest.mark.parametrize("name", ["test_gpu_precision", "test_gpu_memory"])
def test_every_configuration_of_the_suite_can_be_resolved(training, monkeypatch, name):
    module = load(name)
    seen = []

    def run(*overrides):
        resolved = tiny_config(*training.SHAPE, *overrides).finalize(1)
        seen.append(resolved)
        # Falling, and another curve for another configuration where the test wants a difference.
        other = 1e-6 * (resolved.mixed_precision is not None and bool(resolved.mixed_precision.fp8))
        losses = [5.0 - 0.1 * step + other for step in range(20)]
        scales = [2.0**32 / 2**step for step in range(20)]
        return {"losses": losses, "updates": 18, "scales": scales, "peak_bytes": 0}

    monkeypatch.setattr(module, "run", run, raising=False)
    monkeypatch.setattr(module, "losses_of", lambda *overrides: run(*overrides)["losses"])
    monkeypatch.setattr(pytest, "importorskip", lambda name: None)
    if hasattr(module, "Machine"):
        monkeypatch.setattr(module.Machine, "here", classmethod(lambda cls: BLACKWELL))
    tests = {n: f for n, f in vars(module).items() if n.startswith("test_")}
    for function in tests.values():
        for arguments in cases(function):
            wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
            if "bfloat16" in wanted:
                base = run(*training.CUDA, *training.TE, *training.BF16)["losses"]
                arguments["bfloat16"] = [loss + 1e-7 for loss in base]
            function(**arguments)
    assert len(tests) >= 6
    assert len(seen) > 20
    del sys.modules[name]


@pytest.mark.dist
def test_the_benchmark_runs_at_a_tiny_shape(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "train_gpu.py"), "--tiny"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"train_gpu.json", "train_gpu.md"}
    assert "tiny shape on a CPU: not a measurement" in (tmp_path / "train_gpu.md").read_text()
