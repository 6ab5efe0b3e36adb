# SPDX-License-Identifier: Apache-2.0
"""Model TFLOP/s of one GPU on the layers of Llama 3 8B, against matrix products of the same run.

    python benchmarks/train_gpu.py            bf16 and FP8, writes results/train_gpu.{md,json}
    python benchmarks/train_gpu.py --layers 6     instead of as many as fit
    python benchmarks/train_gpu.py --tiny     a tiny model on a CPU, to try the script itself

Sequences of 8192 tokens, micro-batch 1, the distributed optimizer on one rank. A round times one
product of 8192 x 8192 matrices in bfloat16 and then some steps of each precision, so that clock and
temperature are the same for all. Operations are those of `mb_engine.model.flops`: products of the
model forward and backward, recomputation not counted. The aim is 60 percent of the product's rate
in bfloat16, and 700 TFLOP/s with FP8 current scaling.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from attrs import define
from mb_config import ConfigContainer

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
PRECISIONS = {"bf16": "bf16_mixed", "fp8": "bf16_with_fp8_current_scaling_mixed"}
BYTES_A_PARAMETER = {"bf16": 18, "fp8": 19}
"""Parameter, float32 gradient, main parameter and two moments; FP8 keeps a transpose, too."""
LLAMA = {  # Grattafiori et al. 2024, arXiv:2407.21783, table 3
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "seq_length": 8192,
    "vocab_size": 128256,
    "rotary_base": 500000,
}
TINY = {
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 64,
    "vocab_size": 128,
    "rotary_base": 10000,
}


COLUMNS = (
    "precision",
    "layers",
    "spec",
    "ms a step",
    "tokens/s",
    "model TFLOP/s",
    "product TFLOP/s",
    "share of the product (range)",
    "peak GiB",
)


@define(kw_only=True)
class Arguments:
    """What the command line says."""

    layers: int | None
    rounds: int
    steps: int
    tiny: bool
    spec: str
    out: Path


def configuration(args: Arguments, *, precision: str, layers: int) -> ConfigContainer:
    """Return the configuration of one contender."""
    return ConfigContainer.from_dict(
        {
            "model": {
                **(TINY if args.tiny else LLAMA),
                "num_layers": layers,
                "layer_spec": args.spec,
            },
            "train": {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1000},
            "optimizer": {"use_distributed_optimizer": True},
            "dataset": {"type": "mock"},
            "mixed_precision": None if args.tiny else PRECISIONS[precision],
            "dist": {"device": "cpu" if args.tiny else "cuda"},
        }
    )


def layers_that_fit(precision: str) -> int:
    """Return how many layers of Llama 3 8B one GPU holds with their optimizer states.

    An estimate with room to spare: a layer's activations at 8192 tokens with flash attention are
    34 bytes a token and hidden unit plus those of the MLP, logits are float32 and kept thrice.
    """
    hidden, inner, tokens = LLAMA["hidden_size"], LLAMA["ffn_hidden_size"], LLAMA["seq_length"]
    kv = 2 * hidden * LLAMA["num_query_groups"] // LLAMA["num_attention_heads"]
    parameters = hidden * (2 * hidden + kv) + 3 * hidden * inner
    embeddings = 2 * LLAMA["vocab_size"] * hidden
    activations = tokens * (20 * hidden + 8 * inner)
    size = BYTES_A_PARAMETER[precision]
    fixed = embeddings * size + 3 * 4 * tokens * LLAMA["vocab_size"] + 4 * GIB
    free = torch.cuda.mem_get_info()[0] - fixed
    return max(2, int(free / (parameters * size + activations)))


class Trainer:
    """One engine and one batch; `seconds` times some steps of it."""

    def __init__(self, args: Arguments, *, precision: str, layers: int) -> None:
        """Build the engine in this process, whose only rank it is."""
        from mb_engine import Engine
        from mb_engine.model.flops import flops_per_token

        config = configuration(args, precision=precision, layers=layers)
        self.engine = Engine.from_config(config)
        model = self.engine.config.model
        self.operations = flops_per_token(self.engine.config) * model.seq_length
        device = self.engine.layout.device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.vocab_size, (1, model.seq_length + 1), generator=generator)
        self.batch = {
            "tokens": ids[:, :-1].contiguous().to(device),
            "labels": ids[:, 1:].contiguous().to(device),
            "loss_mask": torch.ones(1, model.seq_length, device=device),
            "position_ids": torch.arange(model.seq_length, device=device).expand(1, -1),
        }

    def step(self) -> torch.Tensor:
        """Train once; return the loss without waiting for it."""
        loss = self.engine.forward_backward([self.batch]).loss
        self.engine.optimizer_step()
        return loss

    def seconds(self, steps: int) -> float:
        """Return the seconds of one step, the mean of *steps*."""
        _wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        _wait()
        return (time.perf_counter() - start) / steps


class Product:
    """One product of square matrices, the yardstick."""

    def __init__(self, args: Arguments) -> None:
        """Make the matrices: 8192 x 8192 in bfloat16."""
        size = 256 if args.tiny else 8192
        device = "cpu" if args.tiny else "cuda"
        self.a, self.b = (
            torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        self.operations = 2.0 * size**3

    def seconds(self, repeats: int) -> float:
        """Return the seconds of one product, the mean of *repeats* after some to warm up."""
        for _ in range(3):
            self.a @ self.b
        _wait()
        start = time.perf_counter()
        for _ in range(repeats):
            self.a @ self.b
        _wait()
        return (time.perf_counter() - start) / repeats


def measure(args: Arguments, precision: str) -> dict[str, Any]:
    """Return what was measured in one precision, interleaved with the product."""
    layers = args.layers or (2 if args.tiny else layers_that_fit(precision))
    trainer, product = Trainer(args, precision=precision, layers=layers), Product(args)
    losses = [float(trainer.step()) for _ in range(3)]  # allocates, and captures or tunes kernels
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times: dict[str, list[float]] = {"product": [], "step": []}
    for _ in range(args.rounds):
        times["product"].append(product.seconds(20))
        times["step"].append(trainer.seconds(args.steps))
    losses.append(float(trainer.step()))
    rate = trainer.operations / statistics.median(times["step"]) / 1e12
    peak = product.operations / statistics.median(times["product"]) / 1e12
    ratios = [
        (trainer.operations / step) / (product.operations / one)
        for step, one in zip(times["step"], times["product"], strict=True)
    ]
    found = {
        "precision": precision,
        "layers": layers,
        "layer_spec": args.spec,
        "step_ms": 1e3 * statistics.median(times["step"]),
        "tokens_per_s": trainer.batch["tokens"].numel() / statistics.median(times["step"]),
        "model_tflops": rate,
        "product_tflops": peak,
        "ratio_median": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0,
        "losses": losses,
        "seconds": times,
    }
    trainer.engine.close()
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(args: Arguments) -> dict[str, Any]:
    """Return what the numbers were taken on."""
    packages = {}
    for name in ("torch", "megatron-core", "transformer-engine", "mb-engine"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    device = "CPU" if args.tiny else torch.cuda.get_device_name()
    return {
        "device": device,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    } | packages


def table(args: Arguments, rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    note = "On a tiny shape on a CPU: not a measurement." if args.tiny else "Measured on:"
    lines = [
        "# Training on one GPU: layers of Llama 3 8B, 8192 tokens, micro-batch 1",
        "",
        note,
        "",
        ", ".join(f"{name} {value}" for name, value in about.items()) + ".",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += [
        f"| {r['precision']} | {r['layers']} | {r['layer_spec']} | {r['step_ms']:.1f} |"
        f" {r['tokens_per_s']:,.0f} | {r['model_tflops']:.4g} | {r['product_tflops']:.4g} |"
        f" {r['ratio_median']:.1%} ({r['ratio_low']:.1%} to {r['ratio_high']:.1%}) |"
        f" {r['peak_gib']:.1f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, help="instead of as many as fit")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of one round")
    parser.add_argument("--spec", choices=["te", "torch"], default="te")
    parser.add_argument("--precision", choices=list(PRECISIONS), action="append")
    parser.add_argument("--tiny", action="store_true", help="try the script on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    args = Arguments(
        layers=given.layers,
        rounds=2 if given.tiny else given.rounds,
        steps=1 if given.tiny else given.steps,
        tiny=given.tiny,
        spec="torch" if given.tiny else given.spec,
        out=given.out,
    )
    if not (args.tiny or torch.cuda.is_available()):
        print("train_gpu.py: skipped, it needs a CUDA device; --tiny tries the script on a CPU")
        return
    warnings.simplefilter("ignore")  # of libraries at import; nothing here is about them
    wanted = given.precision or (["bf16"] if args.spec == "torch" else list(PRECISIONS))
    rows = []
    for precision in wanted:
        rows.append(measure(args, precision))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    about = machine(args)
    text = table(args, rows, about)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train_gpu.md").write_text(text, encoding="utf-8")
    (args.out / "train_gpu.json").write_text(
        json.dumps({"machine": about, "rows": rows}, indent=1), encoding="utf-8"
    )
    print(text)


if __name__ == "__main__":
    main()
