# SPDX-License-Identifier: Apache-2.0
"""Time, efficiency and balance of packing a million samples.

    python benchmarks/data_packing.py [--samples 1000000] [--capacity 4096] [--ranks 8]

Lengths are lognormal (median 245 tokens), cut at the capacity. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from mb_engine.data.packing import assign, imbalance, pack


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=8)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(5.5, 1.0, arguments.samples).astype(np.int64) + 1
    lengths = np.minimum(drawn, arguments.capacity)
    begun = time.perf_counter()
    packed = pack(lengths, arguments.capacity)
    seconds = time.perf_counter() - begun

    order = rng.permutation(len(packed))
    begins = packed.starts[:-1]
    cost = np.add.reduceat(lengths[packed.order] ** 2, begins)[order]
    loss = np.add.reduceat((lengths * rng.uniform(0.2, 0.8, len(lengths)))[packed.order], begins)
    size = arguments.ranks * arguments.micro_batches
    steps = min(100, len(packed) // size)
    shuffled, balanced, spent = [], [], 0.0
    for step in range(steps):
        mine = slice(step * size, (step + 1) * size)
        plain = np.arange(size).reshape(-1, arguments.ranks)
        begun = time.perf_counter()
        table = assign(cost[mine], loss[order][mine], arguments.ranks)
        spent += time.perf_counter() - begun
        for rows, into in ((plain, shuffled), (table, balanced)):
            into.append((imbalance(cost[mine][rows]), imbalance(loss[order][mine][rows])))
    names = ("attention", "loss_tokens")
    report = {
        **packed.report(),
        "seconds": round(seconds, 3),
        "most_loaded_rank_above_mean": {
            "shuffled": dict(zip(names, np.mean(shuffled, 0).round(4).tolist(), strict=True)),
            "balanced": dict(zip(names, np.mean(balanced, 0).round(4).tolist(), strict=True)),
        },
        "milliseconds_to_balance_a_step": round(1000 * spent / steps, 2),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
