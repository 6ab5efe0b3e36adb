# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing, and what can be said about the machine it ran on."""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from contenders.shape import Batch, Contender, Shape

YARDSTICK = 0
"""Which contender the others are compared with."""


@frozen(kw_only=True)
class Timing:
    """Seconds per step of one contender, one entry a round: by the clock and of processor time."""

    name: str
    wall_s: list[float]
    cpu_s: list[float]

    def row(self, shape: Shape, yardstick: Timing) -> dict[str, Any]:
        """Return what goes into the table; ratios above 1 are faster than *yardstick*."""
        ratios = [a / b for a, b in zip(yardstick.wall_s, self.wall_s, strict=True)]
        cpu_ratios = [a / b for a, b in zip(yardstick.cpu_s, self.cpu_s, strict=True)]
        return {
            "name": self.name,
            "median_ms": 1e3 * statistics.median(self.wall_s),
            "min_ms": 1e3 * min(self.wall_s),
            "tokens_per_s": shape.tokens / statistics.median(self.wall_s),
            "ratio_median": statistics.median(ratios),
            "ratio_low": statistics.quantiles(ratios, n=4)[0],
            "ratio_high": statistics.quantiles(ratios, n=4)[2],
            "ratio_of_minima": min(yardstick.wall_s) / min(self.wall_s),
            "cpu_ratio_median": statistics.median(cpu_ratios),
        }


def check_same_work(
    contenders: list[Contender], batches: list[Batch], *, tolerance: float = 1e-5
) -> dict[str, Any]:
    """Train all on *batches* and compare what they say the loss is.

    From the second step on the loss depends on the gradients, their clipping and Adam, too.

    Raises:
        ValueError: If parameter counts differ, or a loss by more than *tolerance*.
    """
    counts = {c.name: c.num_parameters() for c in contenders}
    if len(set(counts.values())) != 1:
        raise ValueError(f"contenders differ in parameters: {counts}")
    losses = {c.name: [c.step(batch) for batch in batches] for c in contenders}
    reference = losses[contenders[YARDSTICK].name]
    worst = max(
        abs(a - b) for mine in losses.values() for a, b in zip(mine, reference, strict=True)
    )
    if worst > tolerance:
        raise ValueError(f"losses differ by {worst:.2e} > {tolerance:.0e}: {losses}")
    return {
        "parameters": counts[contenders[YARDSTICK].name],
        "losses": losses,
        "largest_difference": worst,
    }


def interleave(
    contenders: list[Contender], batches: list[Batch], *, rounds: int, steps: int
) -> list[Timing]:
    """Time *steps* steps of each contender in turn, *rounds* times, each time in another order.

    With a fixed order one would always find the caches full of somebody else's code.
    """
    order, shuffled = list(contenders), random.Random(0)
    wall: dict[str, list[float]] = {c.name: [] for c in contenders}
    cpu: dict[str, list[float]] = {c.name: [] for c in contenders}
    # What importing three frameworks left behind would be walked in everybody's collections.
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        shuffled.shuffle(order)
        for contender in order:
            began, began_cpu = time.perf_counter(), time.process_time()
            for i in range(steps):
                contender.step(batches[i % len(batches)])
            wall[contender.name].append((time.perf_counter() - began) / steps)
            cpu[contender.name].append((time.process_time() - began_cpu) / steps)
    gc.unfreeze()
    return [Timing(name=c.name, wall_s=wall[c.name], cpu_s=cpu[c.name]) for c in contenders]


def machine() -> dict[str, Any]:
    """Return processor, cores, load and versions."""
    names = ("torch", "megatron-core", "transformers", "mb-engine")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    """Return the processor's name, with family and model, which a virtual machine does not hide."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    fields: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name}, family {fields.get('cpu family')} model {fields.get('model')}"
