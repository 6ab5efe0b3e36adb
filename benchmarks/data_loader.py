# SPDX-License-Identifier: Apache-2.0
"""Tokens per second that the loader gives, and what it adds to a training step.

    python benchmarks/data_loader.py            writes results/data_loader.{md,json}
    python benchmarks/data_loader.py --micro-batches 40 --trained 6          a quick look

One process without loader workers, for each way of packing. The step is forward and backward of one
micro-batch through a small model; the time until the loader gives the micro-batch is taken apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mb_config import ConfigContainer
from mb_config.records import ProcessLayout
from mb_engine.data import build_datasets, build_tokenizer
from mb_engine.data.loader import batches
from mb_engine.testing import tiny_config

RESULTS = Path(__file__).parent / "results"
MODEL = ("num_layers=4", "hidden_size=256", "ffn_hidden_size=768", "seq_length=1024")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--micro-batches", type=int, default=400)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--trained", type=int, default=60, help="micro-batches trained on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        path = write_samples(Path(folder), arguments.seq_length)
        for packing in ("none", "in_batch", "offline"):
            report[packing] = measure(path, packing, arguments)
            report[packing] |= beside_training(path, packing, arguments.trained)
    about = (
        f"torch {torch.__version__}, Python {platform.python_version()}; {os.cpu_count()} cores,"
        f" {platform.machine()}, load {os.getloadavg()[0]:.1f}; one process, one thread"
    )
    text = as_markdown(report, about)
    print(text)
    if arguments.trained >= 60:
        (RESULTS / "data_loader.md").write_text(text, encoding="utf-8")
        data = json.dumps({"machine": about, "results": report}, indent=1)
        (RESULTS / "data_loader.json").write_text(data + "\n", encoding="utf-8")


def as_markdown(report: dict[str, dict[str, float]], about: str) -> str:
    """Return the table of results."""
    lines = [
        "# The loader of SFT data",
        "",
        f"{about}. Step: forward and backward of one micro-batch, {', '.join(MODEL)}.",
        "",
        "| packing | tokens/s of the loader | rows filled | ms a step | of it waiting for data |",
        "|---|---|---|---|---|",
    ]
    for packing, row in report.items():
        lines.append(
            f"| {packing} | {row['tokens_per_s']:,} | {row['filled']:.1%} |"
            f" {row['step_ms']:.0f} | {row['waiting']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def write_samples(folder: Path, longest: int) -> Path:
    """Write prompts and completions with lognormal lengths."""
    rng = np.random.default_rng(0)
    path = folder / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for size in np.minimum(rng.lognormal(5.5, 1.0, 20_000).astype(int) + 2, longest):
            record = {"prompt": "p" * (size // 2), "completion": "c" * (size - size // 2)}
            file.write(json.dumps(record) + "\n")
    return path


def measure(path: Path, packing: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Read micro-batches for a while."""
    config = settings(path, packing, f"model.seq_length={arguments.seq_length}")
    begun = time.perf_counter()
    reader = open_reader(config)
    next(reader)
    prepared = time.perf_counter() - begun
    begun, real, room = time.perf_counter(), 0, 0
    for _ in range(arguments.micro_batches):
        batch = next(reader)
        real += int(batch["global_tokens"])
        room += batch["tokens"].numel()
    seconds = time.perf_counter() - begun
    return {
        "seconds_to_prepare": round(prepared, 2),
        "tokens_per_s": round(real / seconds),
        "filled": round(real / room, 4),
    }


def beside_training(path: Path, packing: str, count: int) -> dict[str, float]:
    """Train on micro-batches; tell how much of the time went by until they came."""
    from mb_engine import Engine

    config = settings(path, packing, *(f"model.{value}" for value in MODEL))
    engine, reader = Engine.from_config(config), open_reader(config)
    engine.forward_backward([next(reader)])
    waited = trained = 0.0
    for _ in range(count):
        begun = time.perf_counter()
        batch = next(reader)
        read = time.perf_counter()
        engine.forward_backward([batch])
        waited += read - begun
        trained += time.perf_counter() - read
    engine.close()
    return {
        "step_ms": round(1000 * (waited + trained) / count, 1),
        "waiting": round(waited / (waited + trained), 5),
    }


def settings(path: Path, packing: str, *overrides: str) -> ConfigContainer:
    """Return the resolved configuration of one way of packing."""
    return tiny_config(
        "dataset.type=sft",
        f"dataset.path=['{path}']",
        f"dataset.packing={packing}",
        "model.vocab_size=257",
        f"train.micro_batch_size={8 if packing == 'in_batch' else 1}",
        "train.global_batch_size=64",
        *overrides,
    ).finalize(1)


def open_reader(config: ConfigContainer) -> Any:
    """Return the micro-batches of the only rank."""
    return batches(
        build_datasets(config, build_tokenizer(config.tokenizer)).train,
        config=config,
        layout=ProcessLayout(device="cpu"),
        consumed_samples=0,
        global_batch_size=lambda _: 64,
    )


if __name__ == "__main__":
    main()
