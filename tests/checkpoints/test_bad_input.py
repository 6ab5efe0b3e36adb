# SPDX-License-Identifier: Apache-2.0
"""Every bad input gives one line that names it and says what to do, and exit code 2."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RUN = ("run", "--config=job.yaml")
TP2 = ("--nproc=2", "model.tensor_model_parallel_size=2")


def one_line(process):
    """Return the error line, having checked that there is nothing else to read."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    return errors[0]


CONFIG_ERRORS = {
    "unknown key": (["model.hiden_size=64"], ["model", "hiden_size", "hidden_size"]),
    "wrong type": (["train.train_iters=many"], ["train.train_iters", "many", "int"]),
    "world size": (["--nproc=3", *TP2[1:]], ["tensor_model_parallel_size", "3", "multiple"]),
    "sequence length": (
        [*TP2, "model.sequence_parallel=true", "model.seq_length=33"],
        ["model.seq_length=33", "multiple of TP x CP = 2", "sequence_parallel"],
    ),
    "heads": (
        ["--nproc=3", "model.tensor_model_parallel_size=3", "model.num_query_groups=4"],
        ["model.num_attention_heads=4", "3"],
    ),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_a_bad_configuration_is_named_before_anything_starts(mb_train, name):
    arguments, expected = CONFIG_ERRORS[name]
    process = mb_train(*RUN, *arguments)
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    for text in expected:
        assert text in process.stderr, process.stderr


def test_debug_shows_the_traceback(mb_train):
    process = mb_train(*RUN, "--debug", "model.hiden_size=64")
    assert process.returncode != 0
    assert "Traceback" in process.stderr


def test_a_missing_config_file_is_named(mb_train):
    assert "absent.yaml" in one_line(mb_train("run", "--config=absent.yaml"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_missing_data_file_is_named(mb_train, ranks):
    line = one_line(mb_train(*RUN, f"--nproc={ranks}", "dataset.path=[absent.txt]"))
    assert "absent.txt" in line


def test_an_empty_data_file_is_named(mb_train, job):
    (job / "empty.txt").touch()
    line = one_line(mb_train(*RUN, "dataset.path=[empty.txt]"))
    assert "empty.txt" in line
    assert "empty" in line.replace("empty.txt", "")


def test_a_folder_without_a_checkpoint_is_named(mb_train, job):
    (job / "nothing").mkdir()
    line = one_line(mb_train(*RUN, "checkpoint.load=nothing"))
    assert "checkpoint.load=nothing" in line


def test_a_checkpoint_of_another_model_is_refused_field_by_field(mb_train):
    assert mb_train(*RUN, "checkpoint.save=ckpt").returncode == 0
    line = one_line(mb_train(*RUN, "checkpoint.load=ckpt", "model.num_layers=3"))
    assert "model.num_layers=3" in line
    assert "has 2" in line


def test_a_missing_package_is_named_with_its_extra(job):
    program = """
import sys
from importlib import metadata
found = metadata.entry_points
metadata.entry_points = lambda **how: (
    metadata.EntryPoints() if how.get("group") == "mb.checkpointers" else found(**how)
)
from mb_engine.cli import main
sys.exit(main(sys.argv[1:]))
"""
    process = subprocess.run(
        [sys.executable, "-c", program, *RUN, "checkpoint.save=ckpt"],
        cwd=job,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    line = one_line(process)
    assert "checkpoint" in line
    assert 'pip install "mb-engine[ckpt]"' in line


def test_a_port_in_use_is_named(mb_train):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        worker = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        line = one_line(mb_train(*RUN, env=worker))
    assert f"MASTER_PORT={port}" in line
    assert "free" in line


DISK_FULL = """
import resource, sys
from mb_config import ConfigContainer
from mb_config.records import SaveEvent
from mb_engine import pretrain

class FillTheDisk:
    'After the first durable checkpoint no file may grow beyond 4 KiB.'
    def on_event(self, event):
        if isinstance(event, SaveEvent) and event.status == "saved" and event.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        if isinstance(event, SaveEvent):
            print(event.step, event.status, event.error, flush=True)

config = ConfigContainer.from_yaml("job.yaml").override(
    "train.train_iters=6", "checkpoint.save=ckpt", "checkpoint.save_interval=2",
    "checkpoint.async_save=false", "logger.sinks=[]")
result = pretrain(config, callbacks=[FillTheDisk()])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print("ended", result.state.step, result.failed_saves, result.reason)
"""


def test_a_full_disk_fails_the_save_and_not_the_training(job, mb_train):
    process = subprocess.run(
        [sys.executable, "-c", DISK_FULL],
        cwd=job,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "2 saved" in process.stdout
    assert "4 failed" in process.stdout
    assert "ended 6 2 train_iters=6 reached" in process.stdout
    resumed = mb_train(
        *RUN,
        "checkpoint.load=ckpt",
        "logger.sinks=[jsonl]",
        "logger.log_dir=.",
        "train.train_iters=6",
    )
    assert resumed.returncode == 0, resumed.stderr
    events = [json.loads(line) for line in Path(job, "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["kind"] == "step"] == [3, 4, 5, 6]
