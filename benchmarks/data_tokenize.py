# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of ``mb-train data build``, of ``datasets.map`` and of megatron-core's builder.

    python benchmarks/data_tokenize.py [--megabytes 40] [--workers 2]

The text is the documentation of Python, over and over, as JSONL; the tokenizer a byte-level BPE of
8192 tokens trained on it. All three encode it with the same ``tokenizers`` library and write token
files. megatron-core's preprocessing tool is no part of its package; what is measured is the loop that
it runs in each process, one document at a time into an ``IndexedDatasetBuilder``. Prints JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from mb_config import TokenizerConfig
from mb_engine.data.indexed_build import BuildOptions, build_indexed_files

if TYPE_CHECKING:
    from collections.abc import Callable

DOCUMENT = 4000  # characters


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder, arguments.megabytes)
        tokenizer = train_tokenizer(folder)
        report = {
            f"mb-train data build, {n} processes": measure(lambda n=n: ours(data, tokenizer, n))
            for n in sorted({1, arguments.workers})
        }
        report["megatron-core builder, 1 process"] = measure(lambda: megatron(data, tokenizer))
        if importlib.util.find_spec("datasets"):
            for n in sorted({1, arguments.workers}):
                report[f"datasets.map, {n} processes"] = measure(
                    lambda n=n: mapped(data, tokenizer, n)
                )
    print(json.dumps(report, indent=2))


def measure(run: Callable[[], int]) -> dict[str, float]:
    """Return seconds, tokens and tokens per second of *run*, which returns the tokens."""
    begun = time.perf_counter()
    tokens = run()
    seconds = time.perf_counter() - begun
    return {"seconds": round(seconds, 2), "tokens": tokens, "tokens_per_s": round(tokens / seconds)}


def write_data(folder: Path, megabytes: int) -> Path:
    """Write so much text as JSONL, in documents of a few pages."""
    text = "\n".join(topics[name] for name in sorted(topics))
    documents = [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
    path, written = folder / "data.jsonl", 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes << 20:
            for document in documents:
                written += file.write(json.dumps({"text": document}) + "\n")
    return path


def train_tokenizer(folder: Path) -> Path:
    """Train and save a byte-level BPE with 8192 tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(list(topics.values()), trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def ours(data: Path, tokenizer: Path, workers: int) -> int:
    """Build indexed files with this toolkit."""
    options = BuildOptions(
        inputs=(str(data),),
        output=data.with_name(f"ours{workers}"),
        tokenizer=TokenizerConfig(tokenizer_type="huggingface", tokenizer_model=str(tokenizer)),
        workers=workers,
    )
    return build_indexed_files(options).tokens


def megatron(data: Path, tokenizer: Path) -> int:
    """Build indexed files with megatron-core's builder, document by document."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    builder = IndexedDatasetBuilder(str(data.with_name("theirs.bin")), dtype=np.uint16)
    tokens = 0
    with data.open(encoding="utf-8") as file:
        for line in file:
            ids = [*library.encode(json.loads(line)["text"]).ids, 0]
            builder.add_document(torch.tensor(ids), [len(ids)])
            tokens += len(ids)
    builder.finalize(str(data.with_name("theirs.idx")))
    return tokens


def mapped(data: Path, tokenizer: Path, workers: int) -> int:
    """Tokenize with ``datasets.map`` in batches, into its Arrow files."""
    import datasets

    library = tokenizers.Tokenizer.from_file(str(tokenizer))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*row.ids, 0] for row in library.encode_batch(batch["text"])]}

    datasets.disable_progress_bars()
    found = datasets.load_dataset(
        "json", data_files=str(data), split="train", cache_dir=str(data.parent / f"cache{workers}")
    )
    found = found.map(encode, batched=True, remove_columns=["text"], num_proc=workers)
    return sum(len(row) for batch in found.iter(1000) for row in batch["ids"])


if __name__ == "__main__":
    main()
