# SPDX-License-Identifier: Apache-2.0
"""What saving and loading with mb_ckpt costs, against six other ways, on one machine and disk.

    python benchmarks/checkpoint.py                 all of it: results/checkpoint.{md,json}
    python benchmarks/checkpoint.py --orbax         with orbax, in an environment made for it
    python benchmarks/checkpoint.py --state small   only that state
    python benchmarks/checkpoint.py --quick         one round of the small state, writes nothing

The contenders take turns, round by round, in another order each time, so that whatever else the
machine does hits all of them; ratios are medians of the ratios within a round. All that is saved is
fsynced, loads begin with their files dropped from the page cache, and what is loaded is compared bit
for bit with what was saved.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contenders import checkpoint_report, measurement
from contenders.checkpoint_orbax import install
from contenders.checkpoint_states import SIZES
from contenders.checkpoint_worker import run
from contenders.checkpointers import (
    BEHIND,
    DCP_PROCESS,
    MEGATRON,
    MEGATRON_ASYNC,
    MEMCPY,
    READERS,
    SAVERS,
    SAVERS_OF_TWO,
)

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
QUICK_ROUNDS = 1
MANY = "10,000"
LEFT_OUT = (MEGATRON, MEGATRON_ASYNC, DCP_PROCESS)
"""Of the state of most tensors, as orbax is: they take many seconds each, or two open files a tensor."""
MEMORY_STATE = "big"
MEMORY_SAVES = 3


def measure(
    task: dict[str, Any], folder: Path, most_ranks: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the samples of one state, part by part: saves, loads of each kind, and a loop's.

    Args:
        task: With ``state``, ``rounds`` and, where orbax takes part, the Python of ``orbax``.
        folder: To work in; empty again afterwards.
        most_ranks: 1 leaves out what takes two ranks.
    """
    left_out = LEFT_OUT if task["state"] == MANY else ()
    for ranks, savers in ((1, SAVERS), (2, SAVERS_OF_TWO))[:most_ranks]:
        names = [name for name in savers if name not in left_out]
        saving = {"what": "save", "root": str(folder / f"saved_{ranks}"), "contenders": names}
        yield f"save, {_ranks(ranks)}", run(task | saving, ranks)
    names = [name for name in READERS if name not in left_out]
    for saved, ranks in ((1, 1), (2, 2), (2, 1), (1, 2)) if most_ranks > 1 else ((1, 1),):
        loading = {"what": "load", "saved": str(folder / f"saved_{saved}"), "saved_ranks": saved}
        loading |= {"root": str(folder / "loading"), "contenders": names}
        name = f"load, {_ranks(ranks)}" if saved == ranks else f"load, {saved} to {ranks}"
        yield name, run(task | loading, ranks)
    shutil.rmtree(folder)
    names = [MEMCPY, *(name for name in BEHIND if name not in left_out)]
    looping = {"what": "loop", "root": str(folder / "loop"), "contenders": names}
    yield "loop", run(task | looping, 1)
    shutil.rmtree(folder)


def measure_memory(state: str, folder: Path) -> dict[str, Any]:
    """Return the bytes that saving *state* needs beside it, with each contender."""
    found = {}
    for name in dict.fromkeys(SAVERS[2:] + BEHIND):
        task = {"what": "memory", "state": state, "rounds": MEMORY_SAVES, "root": str(folder)}
        found[name] = run(task | {"contenders": [name]}, 1)
        shutil.rmtree(folder)
    return found


def _ranks(count: int) -> str:
    return f"{count} rank{'s'[: count > 1]}"


def main() -> None:
    """Measure what is asked for and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", choices=SIZES, action="append", help="only this state")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--ranks", type=int, choices=(1, 2), default=2, help="1: only what takes one"
    )
    parser.add_argument("--orbax", action="store_true", help="compare with orbax, too")
    parser.add_argument(
        "--orbax-venv", type=Path, help="its environment; a temporary one if left out"
    )
    parser.add_argument("--quick", action="store_true", help="one round of the small state")
    parser.add_argument("--folder", type=Path, help="work there: the disk that is measured")
    parser.add_argument("--out", type=Path, help="folder to write results to")
    arguments = parser.parse_args()
    states = arguments.state or (["small"] if arguments.quick else list(SIZES))
    rounds = QUICK_ROUNDS if arguments.quick else arguments.rounds
    out = arguments.out or (None if arguments.quick or arguments.state else RESULTS)
    about = measurement.machine()
    about["loads"] = [about["load_before"]]
    about["versions"] |= {name: version(name) for name in ("mb-ckpt", "tensorstore", "safetensors")}
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="mb-bench-") as name:
        work, python = Path(name), None
        if arguments.orbax:
            python = install((arguments.orbax_venv or work / "orbax").absolute())
        found: dict[str, Any] = {}
        memory: dict[str, Any] = {}
        results = {"machine": about, "rounds": rounds, "results": found, "memory": memory}
        for state in states:
            found[state] = {}
            task = {"state": state, "rounds": rounds, "orbax": None if state == MANY else python}
            for part, samples in measure(task, work / "state", arguments.ranks):
                found[state][part] = samples
                about["loads"].append(round(os.getloadavg()[0], 1))
                if out is not None:  # after each: the whole takes most of an hour
                    write(results, out)
        if MEMORY_STATE in states:
            memory[MEMORY_STATE] = measure_memory(MEMORY_STATE, work / "memory")
            if out is not None:
                write(results, out)
    print(checkpoint_report.render(**results))


def write(results: dict[str, Any], out: Path) -> None:
    """Write *results* as data and as text."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "checkpoint.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "checkpoint.md").write_text(checkpoint_report.render(**results), encoding="utf-8")


if __name__ == "__main__":
    main()
