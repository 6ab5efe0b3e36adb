# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes: kernels by torch's profiler, Python by cProfile."""

from __future__ import annotations

import cProfile
import pstats
import time
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from contenders.shape import Batch, Contender

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "matmul"),
    "attention": ("_scaled_dot_product", "scaled_dot_product"),
    "optimizer": ("_fused_adam", "_foreach", "Optimizer"),
    "embedding and loss": ("embedding", "log_softmax", "nll_loss", "cross_entropy"),
    "autograd engine": ("autograd::", "Backward"),
}
"""Groups of operators by the beginning of their names; all others move or combine elements."""


def operator_times(contender: Contender, batches: list[Batch], steps: int) -> list[dict[str, Any]]:
    """Return operators with calls and self milliseconds a step, the costly ones first."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for i in range(steps):
            contender.step(batches[i % len(batches)])
    rows = [
        {
            "name": event.key,
            "calls": event.count / steps,
            "ms": event.self_cpu_time_total / 1e3 / steps,
        }
        for event in seen.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def by_kind(operators: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return calls and milliseconds of each kind of operator."""
    totals: dict[str, tuple[float, float]] = {}
    for row in operators:
        kind = _kind(row["name"])
        calls, ms = totals.get(kind, (0.0, 0.0))
        totals[kind] = (calls + row["calls"], ms + row["ms"])
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def python_times(contender: Contender, batches: list[Batch], steps: int) -> list[dict[str, Any]]:
    """Return Python functions with calls and own milliseconds a step, the costly ones first.

    cProfile makes a call of a Python function cost several times as much: read the order and the
    counts, not the sums.
    """
    profiler = cProfile.Profile()
    profiler.enable()
    for i in range(steps):
        contender.step(batches[i % len(batches)])
    profiler.disable()
    rows = [
        {"name": _place(*key), "calls": calls / steps, "ms": own * 1e3 / steps}
        for key, (_, calls, own, _, _) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def step_ms(contender: Contender, batches: list[Batch], steps: int) -> float:
    """Return milliseconds of one step without a profiler."""
    began = time.perf_counter()
    for i in range(steps):
        contender.step(batches[i % len(batches)])
    return (time.perf_counter() - began) * 1e3 / steps


def _kind(name: str) -> str:
    bare = name.removeprefix("aten::")
    for kind, beginnings in KINDS.items():
        if bare.startswith(beginnings) or (kind == "autograd engine" and "Backward" in bare):
            return kind
    return "element-wise, copies, views"


def _place(file: str, line: int, function: str) -> str:
    """Return a function's name with its file below site-packages, without machine paths."""
    if not line:
        return function.strip("<>")
    parts = Path(file).parts
    for root in ("site-packages", "src"):
        if root in parts:
            parts = parts[len(parts) - parts[::-1].index(root) :]
            break
    else:
        parts = parts[-2:]
    return f"{'/'.join(parts)}:{line} {function}"
