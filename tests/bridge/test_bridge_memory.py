# SPDX-License-Identifier: Apache-2.0
"""Conversions of a model that is larger than the memory they may take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mb_engine.bridge.hub_writer import HubWriter, Planned

HIDDEN, FFN, LAYERS, VOCAB = 1024, 4096, 12, 30_000  # 476 MiB in bfloat16
LARGEST = 2 * VOCAB * HIDDEN / 2**20
ALLOWED = LARGEST + 256e6 / 2**20

CONVERT = """
import re, sys
from pathlib import Path
from mb_engine.bridge import export_hf, import_hf

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

root = Path(sys.argv[1])
for name in ("small", "large"):  # the first loads the libraries
    for what in (import_hf, export_hf):
        begin = [root / name, root / f"{name} checkpoint"]
        end = [root / f"{name} checkpoint", root / f"{name} again"]
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        before = status("VmRSS")
        what(*(begin if what is import_hf else end))
        print(name, what.__name__, status("VmHWM") - before)
"""


def write_llama(folder, *, hidden, ffn, layers, vocab):
    """Write a Llama with random weights in bfloat16."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": vocab}
    config |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    norms = ("input_layernorm", "post_attention_layernorm")
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    } | dict.fromkeys(norms, (hidden,))
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
    shapes["lm_head"] = (vocab, hidden)
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in matrices.items()}
    plan = [
        Planned(name=f"{name}.weight", dtype="BF16", shape=shape) for name, shape in shapes.items()
    ]
    generator = torch.Generator().manual_seed(0)
    with HubWriter(folder, plan) as writer:
        for tensor in plan:
            values = torch.randn(tensor.shape[1:], generator=generator).bfloat16()
            for row in range(0, tensor.shape[0], 1000):
                rows = min(1000, tensor.shape[0] - row)
                writer.write_rows(tensor.name, row, values.expand(rows, *tensor.shape[1:]) + row)
        writer.finish()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts as Linux does")
def test_no_conversion_takes_more_than_the_largest_tensor_and_256_megabytes(tmp_path):
    write_llama(tmp_path / "small", hidden=64, ffn=96, layers=1, vocab=99)
    write_llama(tmp_path / "large", hidden=HIDDEN, ffn=FFN, layers=LAYERS, vocab=VOCAB)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size / 2**20
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    peaks = {
        what: float(peak) for what, peak in (x.rsplit(maxsplit=1) for x in done.stdout.splitlines())
    }
    for what in ("import_hf", "export_hf"):
        assert peaks[f"large {what}"] < ALLOWED < 0.7 * size, peaks
    for name in ("small", "large"):
        for path in (tmp_path / name).iterdir():
            assert path.read_bytes() == (tmp_path / f"{name} again" / path.name).read_bytes()
