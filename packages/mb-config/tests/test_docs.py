# SPDX-License-Identifier: Apache-2.0
"""What README and docs show is what the code does."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest
from mb_config import reference
from mb_config.sections.precision import PRECISIONS

PACKAGE = pathlib.Path(__file__).parents[1]
DOCS = PACKAGE.parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page(path: pathlib.Path) -> str:
    if not path.exists():
        pytest.skip(f"{path.name} is not part of this distribution")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", [PACKAGE / "README.md", DOCS / "configuration.md"], ids=lambda p: p.name
)
def test_blocks_run_and_print_what_is_shown(path, tmp_path):
    blocks = BLOCK.findall(page(path))
    code = "\n".join(text for language, text in blocks if language == "python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = [line for language, text in blocks if language == "text" for line in text.splitlines()]
    assert shown
    assert [line for line in shown if line not in done.stdout.splitlines()] == []


def test_the_reference_page_is_the_code():
    written = page(DOCS / "configuration-reference.md")
    assert written == reference.markdown(), "run python -m mb_config.reference"


def test_the_reference_shows_defaults_ranges_and_names():
    made = reference.markdown()
    assert "| `adam_beta2` | a number, ≥ 0 and < 1 | `0.95` | Decay of the second moment. |" in made
    assert "| `num_microbatches` | an int or null | derived |" in made
    assert "## `dataset`, `type: text`" in made
    assert all(f"| `{name}` |" in made for name in PRECISIONS)


def test_the_derived_fields_the_overview_names_exist(small):
    resolved = small.override("mixed_precision=bf16_mixed").finalize(2)
    derived = {p for p, o in resolved._origins.items() if o.kind == "derived"}
    text = page(DOCS / "configuration.md")
    table = text[text.index("What finalize derives:") : text.index("### Derived values follow")]
    for path in derived - {"mixed_precision"}:
        name = path.split(".")[1]
        short = re.sub(r"^eval_.*_batch_size$", "eval_*_batch_size", name)
        named = short in table or name in {
            "grad_reduce_in_fp32", "fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag",
        }  # fmt: skip
        assert named, path
