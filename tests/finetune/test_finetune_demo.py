# SPDX-License-Identifier: Apache-2.0
"""The second main job, shortened: its own checks of losses and logits are what makes it end well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a short run, and what it printed."""
    folder = tmp_path_factory.mktemp("finetune") / "run"
    command = [sys.executable, EXAMPLES / "finetune.py", "--folder", folder]
    done = subprocess.run(
        [*map(str, command), "--pairs=300", "--steps=20"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_summary_names_what_is_there(made):
    folder, printed = made
    summary = printed.partition("=== Done")[2]
    named = [Path(word.rstrip(",")) for word in summary.split() if word.startswith(str(folder))]
    assert {path.name for path in named} >= {
        "exported", "checkpoints", "metrics.jsonl", "loss.png", "data", "run.yaml",
    }  # fmt: skip
    assert all(path.exists() for path in named)


def test_both_comparisons_were_made_and_the_loss_fell(made):
    _, printed = made
    assert len(re.findall(r"largest difference of a logit: \d\.\de-0\d", printed)) == 2
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after", printed).groups())
    assert 7.2 < before < 8.5  # chance is ln(2048) = 7.6; random logits add half their variance
    assert after < 0.85 * before


def test_training_read_packed_rows_on_two_ranks(made):
    folder, printed = made
    assert "2 x CPU" in printed
    (report,) = [
        report
        for path in folder.glob("data/.mb-cache/*/report.json")
        if (report := json.loads(path.read_text()))["sources"][0]["records"] == 275
    ]
    assert report["packing"]["efficiency"] > 0.9


def test_the_exported_folder_has_the_files_of_the_source(made):
    folder, _ = made
    names = {path.name for path in (folder / "source").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"} <= names
    assert {path.name for path in (folder / "exported").iterdir()} == names


def test_no_answer_is_learnt_and_asked_for(made):
    folder, _ = made
    answers = [
        {json.loads(line)["messages"][1]["content"] for line in file.read_text().splitlines()}
        for file in (folder / "data").glob("*.jsonl")
    ]
    assert [len(one) for one in answers] in ([275, 25], [25, 275])
    assert not answers[0] & answers[1]
