# SPDX-License-Identifier: Apache-2.0
"""Tokens per second that the loader gives, to be held against those that training takes.

    python benchmarks/data_loader.py [--micro-batches 400] [--seq-length 4096]

Prints one JSON object, for each way of packing: tokens per second of one process without loader
workers, rows and the share of them that is filled.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from mb_config.records import ProcessLayout
from mb_engine.data import build_datasets, build_tokenizer
from mb_engine.data.loader import batches
from mb_engine.testing import tiny_config


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--micro-batches", type=int, default=400)
    parser.add_argument("--seq-length", type=int, default=4096)
    arguments = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        path = write_samples(Path(folder), arguments.seq_length)
        for packing in ("none", "in_batch", "offline"):
            report[packing] = measure(path, packing, arguments)
    print(json.dumps(report, indent=2))


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
    config = tiny_config(
        "dataset.type=sft",
        f"dataset.path=['{path}']",
        f"dataset.packing={packing}",
        f"model.seq_length={arguments.seq_length}",
        "model.vocab_size=257",
        f"train.micro_batch_size={8 if packing == 'in_batch' else 1}",
        "train.global_batch_size=64",
    ).finalize(1)
    begun = time.perf_counter()
    train = build_datasets(config, build_tokenizer(config.tokenizer)).train
    prepared = time.perf_counter() - begun
    reader = batches(
        train,
        config=config,
        layout=ProcessLayout(device="cpu"),
        consumed_samples=0,
        global_batch_size=lambda _: 64,
    )
    next(reader)
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


if __name__ == "__main__":
    main()
