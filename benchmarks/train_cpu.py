# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of mb_engine against a hand-written PyTorch loop and transformers, on a CPU.

    python benchmarks/train_cpu.py              both sizes, writes results/train_cpu.{md,json}
    python benchmarks/train_cpu.py --quick      a few rounds, writes nothing unless --out is given
    python benchmarks/train_cpu.py --profile    where a step's time goes: results/train_cpu_profile.md
    python benchmarks/train_cpu.py --won-back   what each short way of the torch layer spec is worth

All three train the same Llama from the same weights on the same batches, in one process, a turn
each, round by round, so that whatever else the machine does hits all of them. A step is forward,
loss, backward, clipping to norm 1, AdamW and reading the loss. Before anything is timed, parameter
counts must be equal and the losses of three steps equal within 1e-5.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from contenders import measurement, profile
from contenders.shape import HIDDEN_64, HIDDEN_256, Shape, batches, initial_weights

RESULTS = Path(__file__).parent / "results"
SHAPES = {"h256": HIDDEN_256, "h64": HIDDEN_64}
ROUNDS = {"h256": (24, 1), "h64": (60, 10)}
"""Rounds, and steps of one turn: a turn of the small model must be long enough to be timed."""
WON_BACK_ROUNDS = {"h256": (9, 1), "h64": (60, 4)}
QUICK_ROUNDS = {"h256": (2, 1), "h64": (4, 5)}
PROFILE_STEPS = {"h256": 3, "h64": 40}


def contenders(shape: Shape) -> list[Any]:
    """Return all three with the same weights, the yardstick first."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")  # of libraries at import; nothing here is about them
    logging.disable(logging.INFO)
    from contenders.engine import EngineLoop
    from contenders.hugging_face import HuggingFace
    from contenders.plain import Plain

    torch.set_num_threads(shape.threads)
    weights = initial_weights(shape)
    return [kind(shape, weights) for kind in (Plain, EngineLoop, HuggingFace)]


def measure(name: str, quick: bool) -> dict[str, Any]:
    """Return what was measured at one size."""
    shape = SHAPES[name]
    rounds, steps = (QUICK_ROUNDS if quick else ROUNDS)[name]
    all_three, data = contenders(shape), batches(shape, 4)
    same = measurement.check_same_work(all_three, data[:3])
    timings = measurement.interleave(all_three, data, rounds=rounds, steps=steps)
    rows = [t.row(shape, timings[measurement.YARDSTICK]) for t in timings]
    _close(all_three)
    return {
        "shape": attrs.asdict(shape),
        "rounds": rounds,
        "steps_per_round": steps,
        "same_work": same,
        "rows": rows,
    }


def profiled(name: str, _quick: bool) -> dict[str, Any]:
    """Return where the time goes at one size, for all three."""
    shape, steps = SHAPES[name], PROFILE_STEPS[name]
    all_three, data = contenders(shape), batches(shape, 4)
    measurement.check_same_work(all_three, data[:3])
    found = {}
    for contender in all_three:
        operators = profile.operator_times(contender, data, steps)
        found[contender.name] = {
            "step_ms": profile.step_ms(contender, data, 4 * steps),
            "kinds": profile.by_kind(operators),
            "operators": operators[:18],
            "python": profile.python_times(contender, data, steps)[:25],
        }
    _close(all_three)
    return {"shape": shape.name, "contenders": found}


def won_back(name: str, quick: bool) -> dict[str, Any]:
    """Return the engine with and without each of its short ways, against the yardstick."""
    shape = SHAPES[name]
    rounds, steps = (QUICK_ROUNDS if quick else WON_BACK_ROUNDS)[name]
    plain, engine, _ = contenders(shape)
    engine.close()
    from contenders.won_back import all_variants

    several, data = [plain, *all_variants(shape, initial_weights(shape))], batches(shape, 4)
    same = measurement.check_same_work(several, data[:3])
    timings = measurement.interleave(several, data, rounds=rounds, steps=steps)
    rows = [t.row(shape, timings[measurement.YARDSTICK]) for t in timings]
    _close(several)
    return {
        "shape": attrs.asdict(shape),
        "rounds": rounds,
        "steps_per_round": steps,
        "same_work": same,
        "rows": rows,
    }


def _close(all_three: list[Any]) -> None:
    for contender in all_three:
        if hasattr(contender, "close"):
            contender.close()


def in_process(task: Callable[..., dict[str, Any]], name: str, quick: bool) -> dict[str, Any]:
    """Run *task* for one size in a process of its own: thread counts and groups are global."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, (name, quick))


def table(result: dict[str, Any]) -> str:
    """Return the markdown of one size."""
    s = result["shape"]
    lines = [
        (
            f"## {s['name']}: {s['layers']} layers, ffn {s['ffn']}, {s['heads']} heads in "
            f"{s['groups']} groups, vocabulary {s['vocab']}, sequence {s['seq']}, micro-batch "
            f"{s['micro_batch']}, {s['threads']} thread{'s'[: s['threads'] > 1]}"
        ),
        "",
        (
            f"{result['same_work']['parameters']:,} parameters each; largest difference of a loss over "
            f"three steps {result['same_work']['largest_difference']:.1e}; {result['rounds']} rounds of "
            f"{result['steps_per_round']} step{'s'[: result['steps_per_round'] > 1]}."
        ),
        "",
        (
            "| | tokens/s (median) | ms/step median | min | speed against the hand-written loop "
            "| its quartiles | of the minima | by processor time |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['name']} | {r['tokens_per_s']:,.0f} | {r['median_ms']:.2f} | {r['min_ms']:.2f} "
        f"| **{r['ratio_median']:.3f}** | {r['ratio_low']:.3f} to {r['ratio_high']:.3f} "
        f"| {r['ratio_of_minima']:.3f} | {r['cpu_ratio_median']:.3f} |"
        for r in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def profile_tables(result: dict[str, Any]) -> str:
    """Return the markdown of one size's profile."""
    parts = [f"## {result['shape']}\n"]
    for name, found in result["contenders"].items():
        total = sum(ms for _, ms in found["kinds"].values())
        parts.append(f"### {name}: {found['step_ms']:.2f} ms a step without profiler\n")
        parts.append("| kind | calls | ms under the profiler | share |\n|---|---|---|---|")
        parts += [
            f"| {kind} | {calls:.0f} | {ms:.2f} | {ms / total:.0%} |"
            for kind, (calls, ms) in found["kinds"].items()
        ]
        parts.append("\n| operator | calls | self ms |\n|---|---|---|")
        parts += [
            f"| `{row['name']}` | {row['calls']:.0f} | {row['ms']:.3f} |"
            for row in found["operators"]
        ]
        if name != "mb-engine":
            continue
        parts.append("\n| Python function (cProfile) | calls | own ms |\n|---|---|---|")
        parts += [
            f"| `{row['name']}` | {row['calls']:.1f} | {row['ms']:.3f} |" for row in found["python"]
        ]
    return "\n".join(parts) + "\n"


def header(title: str, about: dict[str, Any]) -> str:
    """Return title, machine and versions as markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return (
        f"# {title}\n\n{about['cpu']}, {about['cores']} cores, {about['simd']}; "
        f"{about['system']}, Python {about['python']}, {versions}; float32; {about['date']}, "
        f"load before the run {about['load_before']}.\n"
    )


def main() -> None:
    """Measure or profile the sizes asked for and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this size")
    parser.add_argument("--quick", action="store_true", help="a few rounds, for CI")
    parser.add_argument("--profile", action="store_true", help="where the time goes instead")
    parser.add_argument("--won-back", action="store_true", help="with and without each short way")
    parser.add_argument("--out", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    names = arguments.shape or list(SHAPES)
    about = measurement.machine()
    task = profiled if arguments.profile else won_back if arguments.won_back else measure
    results = {name: in_process(task, name, arguments.quick) for name in names}
    if arguments.profile:
        stem, title, render = "train_cpu_profile", "Where the time of a step goes", profile_tables
    elif arguments.won_back:
        stem, title, render = "train_cpu_won_back", "What each short way is worth", table
    else:
        stem, title, render = "train_cpu", "Training on a CPU: one rank, float32", table
    text = "\n".join([header(title, about), *map(render, results.values())])
    print(text)
    out = arguments.out or (None if arguments.quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{stem}.md").write_text(text, encoding="utf-8")
        data = json.dumps({"machine": about, "results": results}, indent=1)
        (out / f"{stem}.json").write_text(data + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
