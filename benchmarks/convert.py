# SPDX-License-Identifier: Apache-2.0
"""Seconds and peak memory of conversions, against ``transformers`` loading and saving the same folder.

    python benchmarks/convert.py            writes results/convert.{md,json}
    python benchmarks/convert.py --quick    a small model and one round; writes nothing without --out

A Llama in bfloat16 with random weights is made on the spot. Every case is a fresh process that first
loads its libraries and converts a tiny model; counted are the seconds of the conversion after that, and
the peak of resident memory above what was resident before. The cases take turns, so that whatever
else the machine does hits all of them. Our files are durable when a conversion ends; those of
``transformers`` are timed both as it leaves them and after an ``fsync``. The source is in the page
cache. Fails if a conversion of ours takes more memory than the largest tensor and 256 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CASES = {
    "import": "mb-train convert import (folder to checkpoint)",
    "export": "mb-train convert export (checkpoint to folder)",
    "transformers": "transformers from_pretrained and save_pretrained (folder to folder)",
    "copy": "cp of the folder, and fsync",
}
SMALL = {"hidden": 64, "ffn": 96, "layers": 1, "vocab": 99}
LARGE = {"hidden": 2048, "ffn": 8192, "layers": 6, "vocab": 48_000}
QUICK = {"hidden": 1024, "ffn": 4096, "layers": 8, "vocab": 30_000}
ALLOWED = 256e6 / 2**20


def write_llama(folder: Path, *, hidden: int, ffn: int, layers: int, vocab: int) -> float:
    """Write a Llama with random weights in bfloat16; return MiB of its largest tensor."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": vocab}
    config |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    shapes |= {"model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {f"{name}.weight": torch.randn(s).bfloat16() for name, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return max(t.nbytes for t in tensors.values()) / 2**20


def status(name: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024


def fsync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def convert(case: str, root: Path, name: str) -> None:
    """Do one conversion."""
    source, checkpoint = root / name, root / f"{name} checkpoint"
    target = root / f"{name} {case}"
    if case == "import":
        from mb_engine.bridge import import_hf

        import_hf(source, checkpoint)
    elif case == "export":
        from mb_engine.bridge import export_hf

        export_hf(checkpoint, target)
    elif case == "transformers":
        import torch
        import transformers

        load = transformers.AutoModelForCausalLM.from_pretrained
        load(source, dtype=torch.bfloat16).save_pretrained(target)
    else:
        shutil.copytree(source, target)


def child(case: str, root: Path) -> None:
    """Measure one case in this process, and print it as JSON."""
    for name in ("small", "large"):
        out = root / (f"{name} checkpoint" if case == "import" else f"{name} {case}")
        shutil.rmtree(out, ignore_errors=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
        convert(case, root, name)
        returned, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = status("VmHWM") - before
        if case in {"transformers", "copy"}:
            fsync(out)
        durable = time.perf_counter() - wall
    found = {"returned_s": returned, "durable_s": durable, "cpu_s": cpu, "peak_mib": peak}
    print(json.dumps(found))


def measure(case: str, root: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", case, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def same(source: Path, made: Path) -> bool:
    """Return whether the tensors of two folders have the same bytes."""
    from safetensors import safe_open

    name = "model.safetensors"
    with safe_open(source / name, "pt") as a, safe_open(made / name, "pt") as b:
        return set(a.keys()) == set(b.keys()) and all(
            bool((a.get_tensor(key) == b.get_tensor(key)).all())
            for key in a.keys()  # noqa: SIM118 it is no mapping
        )


def table(found: dict[str, list[dict[str, float]]], size: float, largest: float) -> str:
    rounds = len(found["import"])
    names = ("torch", "transformers", "safetensors", "tensorstore")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    lines = [
        "# Conversion of a Hugging Face folder",
        "",
        (
            f"A Llama of {size:.0f} MiB in bfloat16, largest tensor {largest:.0f} MiB; {versions},"
            f" Python {platform.python_version()}; {os.cpu_count()} cores, {platform.machine()}, load"
            f" {os.getloadavg()[0]:.1f}; medians of {rounds} fresh processes a case, interleaved."
        ),
        "",
        "| case | s until it returns | s until durable | s of processor time | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for case, rows in found.items():
        keys = ("returned_s", "durable_s", "cpu_s", "peak_mib")
        median = {key: statistics.median(row[key] for row in rows) for key in keys}
        lines.append(
            f"| {CASES[case]} | {median['returned_s']:.2f} | {median['durable_s']:.2f} |"
            f" {median['cpu_s']:.2f} | {median['peak_mib']:.0f} |"
        )
    lines += ["", "Peak: resident memory above that of the process with its libraries loaded.", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]))
        return 0
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    folder = arguments.out or (None if arguments.quick else RESULTS)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_llama(root / "small", **SMALL)
        largest = write_llama(root / "large", **(QUICK if arguments.quick else LARGE))
        size = (root / "large" / "model.safetensors").stat().st_size / 2**20
        found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for _ in range(rounds):
            for case in CASES:
                found[case].append(measure(case, root))
        text = table(found, size, largest)
        print(text)
        for case in ("export", "transformers"):
            assert same(root / "large", root / f"large {case}"), case
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "convert.md").write_text(text)
        (folder / "convert.json").write_text(json.dumps(found, indent=1) + "\n")
    peak = max(row["peak_mib"] for case in ("import", "export") for row in found[case])
    if peak > largest + ALLOWED:
        print(f"a conversion took {peak:.0f} MiB; {largest + ALLOWED:.0f} are allowed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
