# SPDX-License-Identifier: Apache-2.0
"""Milliseconds to import mb_config, against its dependencies alone and an empty interpreter.

    python benchmarks/config_import.py            writes results/config_import.{md,json}
    python benchmarks/config_import.py --quick    a few rounds, writes nothing unless --out is given

Every measurement is a fresh interpreter; the cases take turns, so that whatever else the machine
does hits all of them. A case's time is that of its import statements inside the interpreter
(wall and processor time), so the start of Python itself is not in it. Fails if the best import of
mb_config takes 100 ms of processor time or more, or if it loads torch or numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CASES = {
    "mb_config": "import mb_config",
    "attrs": "import attrs",
    "attrs cattrs yaml": "import attrs, cattrs, yaml",
    "mb_config, read a file, resolve": (
        "from mb_config import ConfigContainer; ConfigContainer.from_yaml(FILE).finalize(8)"
    ),
}
FILE = """
model: {num_layers: 4, hidden_size: 256, num_attention_heads: 8, seq_length: 512}
train: {train_iters: 100}
dataset: {type: text, path: ["pydoc:topics"]}
"""
PROGRAM = """
import sys, time
FILE = sys.argv[1]
wall, cpu = time.perf_counter(), time.process_time()
{case}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
heavy = [m for m in ("torch", "numpy", "megatron") if m in sys.modules]
print(1e3 * wall, 1e3 * cpu, ",".join(heavy) or "-")
"""
LIMIT_MS = 100.0


def measure(case: str, file: Path) -> tuple[float, float, str]:
    """Return wall ms, processor ms and heavy modules loaded, of one fresh interpreter."""
    program = PROGRAM.format(case=CASES[case])
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
    )
    wall, cpu, heavy = done.stdout.split()
    return float(wall), float(cpu), heavy


def table(times: dict[str, list[tuple[float, float, str]]], rounds: int) -> str:
    lines = [
        "# Import time of mb_config",
        "",
        (
            f"Python {platform.python_version()}, attrs {metadata.version('attrs')},"
            f" cattrs {metadata.version('cattrs')}, PyYAML {metadata.version('PyYAML')};"
            f" {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f};"
            f" {rounds} fresh interpreters a case, interleaved."
        ),
        "",
        "| case | best wall ms | median wall ms | best CPU ms | heavy modules |",
        "|---|---|---|---|---|",
    ]
    for case, found in times.items():
        walls, cpus = [w for w, _, _ in found], [c for _, c, _ in found]
        lines.append(
            f"| {case} | {min(walls):.0f} | {statistics.median(walls):.0f} | {min(cpus):.0f} |"
            f" {found[0][2]} |"
        )
    lines += [
        "",
        "mb_config imports attrs at once, and cattrs, PyYAML and tomllib when a file is first read.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else 25
    folder = arguments.out or (None if arguments.quick else RESULTS)
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "run.yaml"
        file.write_text(FILE)
        times: dict[str, list[tuple[float, float, str]]] = {case: [] for case in CASES}
        for _ in range(rounds):
            for case in CASES:
                times[case].append(measure(case, file))
    text = table(times, rounds)
    print(text)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config_import.md").write_text(text)
        (folder / "config_import.json").write_text(json.dumps(times, indent=1) + "\n")
    best, heavy = min(cpu for _, cpu, _ in times["mb_config"]), times["mb_config"][0][2]
    if best >= LIMIT_MS or heavy != "-":
        print(f"mb_config took {best:.0f} ms of processor time and loaded {heavy}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
