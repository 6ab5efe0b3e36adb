# SPDX-License-Identifier: Apache-2.0
"""The main job, end to end: train, evaluate, checkpoint, resume in two other layouts, generate.

Everything below is the command line that a user would type; nothing here is needed to train.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "quickstart.yaml"
RUN = Path("runs/quickstart")
METRICS = RUN / "metrics.jsonl"
PROMPT = "The import statement "
MAX_LOSS = 1.9
MAX_JUMP = 0.15
STEPS = (30, 150, 180)


def mb_train(*arguments: str) -> None:
    """Run ``mb-train`` and stop with its exit code if it fails."""
    print(f"\n$ mb-train {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "mb_engine.cli", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def layouts() -> list[tuple[str, list[str]]]:
    """Return a name and overrides for each part of the run, as the machine allows."""
    import torch

    two = ["--nproc=2"]
    tp = ["model.tensor_model_parallel_size=1", "model.sequence_parallel=false"]
    stages = ["pipeline_model_parallel_size=2", "num_layers_in_first_pipeline_stage=2"]
    pp = [*tp, *(f"model.{stage}" for stage in stages)]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 1:
        cpu = [*two, "dist.device=cpu"]
        first = ("1 GPU", ["--nproc=1", *tp])
        return [first, ("data parallel 2, on the CPU", cpu + tp), ("pipeline parallel 2", cpu + pp)]
    return [
        ("tensor parallel 2 with sequence parallel", two),
        ("data parallel 2", two + tp),
        ("pipeline parallel 2", two + pp),
    ]


def events(kind: str) -> list[dict]:
    """Return the records of one kind, in order."""
    with METRICS.open() as lines:
        return [e for e in map(json.loads, lines) if e["kind"] == kind]


def mean_loss(steps: list[dict]) -> float:
    """Return the mean loss of *steps*."""
    return sum(s["loss"] for s in steps) / len(steps)


def main() -> None:
    """Run it all and say where everything is."""
    begun = time.perf_counter()
    shutil.rmtree(RUN, ignore_errors=True)
    parts = layouts()
    seams = []
    for index, ((name, overrides), steps) in enumerate(zip(parts, STEPS, strict=True)):
        print(f"\n=== {'Train' if index == 0 else 'Resume'}: {name}", flush=True)
        flags = [o for o in overrides if o.startswith("--")]
        settings = [o for o in overrides if not o.startswith("--")]
        load = [f"checkpoint.load={RUN}/checkpoints"] if index else []
        before = events("step") if index else []
        mb_train(
            "run", f"--config={CONFIG}", *flags, f"train.train_iters={steps}", *settings, *load
        )
        if index:
            after = [e for e in events("step") if e["step"] > before[-1]["step"]]
            seams.append((name, mean_loss(before[-2:]), mean_loss(after[:2])))
    name, overrides = parts[0]
    print(f"\n=== Generate: {name}", flush=True)
    flags = [o for o in overrides if o.startswith("--")]
    settings = [o for o in overrides if not o.startswith("--")]
    mb_train(
        "generate",
        f"--config={CONFIG}",
        *flags,
        f"--prompt={PROMPT}",
        "--max-new-tokens=200",
        *settings,
        f"checkpoint.load={RUN}/checkpoints",
    )
    summary(seams, time.perf_counter() - begun)


def summary(seams: list[tuple[str, float, float]], seconds: float) -> None:
    """Print what came out and what to try next; exit 1 if the run did not learn as it should."""
    evaluations = events("eval")
    last = evaluations[-1]["loss"]
    print(f"\n=== Done in {seconds:.0f} s")
    print(f"validation loss  {last:.3f} nats per byte (5.55 is chance, below {MAX_LOSS} is learnt)")
    for name, before, after in seams:
        print(f"resumed as {name}: loss {before:.3f} before, {after:.3f} after")
    print(f"metrics          {METRICS}")
    print(f"picture          {RUN / 'loss.png'}")
    print(f"TensorBoard      tensorboard --logdir {RUN / 'tensorboard'}")
    print(f"checkpoints      {RUN / 'checkpoints'}")
    print("next             mb-train run --config quickstart.yaml train.train_iters=50")
    print("                 mb-train run --config quickstart.yaml model.num_layers=8 --nproc 2")
    print("                 docs/getting-started.md")
    jumps = [after - before for _, before, after in seams]
    if last >= MAX_LOSS or max(jumps) > MAX_JUMP:
        sys.exit(f"error: expected a loss below {MAX_LOSS} and jumps below {MAX_JUMP}")


if __name__ == "__main__":
    main()
