# SPDX-License-Identifier: Apache-2.0
"""The metrics file is readable after whatever happens to the process or the disk."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time

import pytest
from mb_logging import JSONL, LoggingError, read_events
from mb_logging.testing import check_sink, sample_events


def test_it_is_a_sink(tmp_path):
    check_sink(lambda: JSONL(tmp_path / "metrics.jsonl"))


def test_one_object_a_line_with_its_kind_is_there_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "deep" / "er" / "metrics.jsonl"
    sink = JSONL(path)
    begun = time.time()
    for count, event in enumerate(sample_events(), start=1):
        sink.write(event)
        assert len(path.read_text().splitlines()) == count  # nothing waits in a buffer
    sink.close()
    data = [json.loads(line) for line in path.read_text().splitlines()]
    assert [d["kind"] for d in data] == [
        "run", "step", "step", "eval", "save", "save", "save", "end",
    ]  # fmt: skip
    assert all(begun - 1 < d["time"] < time.time() + 1 for d in data)
    assert repr(list(read_events(path))) == repr(sample_events())


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for part in (sample_events()[:4], sample_events()[4:]):
        sink = JSONL(path)
        for event in part:
            sink.write(event)
        sink.close()
    assert repr(list(read_events(path))) == repr(sample_events())


@pytest.mark.parametrize("size", [1, 20, 100_000])
def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path, size):
    path = tmp_path / "metrics.jsonl"
    sink = JSONL(path)
    sink.write(sample_events()[0])
    sink.close()
    with path.open("a") as file:
        file.write(('{"kind": "run", "run_name": "' + "x" * 200_000)[:size])
    sink = JSONL(path)
    sink.write(sample_events()[-1])
    sink.close()
    for line in path.read_text().splitlines():
        json.loads(line)
    assert list(read_events(path)) == [sample_events()[0], sample_events()[-1]]


def test_a_whole_line_that_only_lacks_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JSONL(path)
    sink.write(sample_events()[0])
    sink.close()
    path.write_text(path.read_text().rstrip("\n"))
    sink = JSONL(path)
    sink.write(sample_events()[-1])
    sink.close()
    assert list(read_events(path)) == [sample_events()[0], sample_events()[-1]]


def test_opening_a_file_changes_nothing_in_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("half a l")
    JSONL(path).close()
    assert path.read_text() == "half a l"


def test_a_kill_in_the_middle_leaves_whole_lines_and_all_that_were_written(tmp_path):
    code = """
        import os, signal, sys
        from mb_config.records import RunEnd
        from mb_logging import JSONL
        sink = JSONL("metrics.jsonl")
        for step in range(1000):
            sink.write(RunEnd(step=step, reason="x" * 5000))
            if step == 321:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=False)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(322))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_an_error_and_room_later_mends_the_file(tmp_path):
    code = """
        import resource
        from mb_config.records import RunEnd
        from mb_logging import JSONL
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        sink = JSONL("metrics.jsonl")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        errors = []
        for step in range(20):
            try:
                sink.write(RunEnd(step=step, reason="r" * 50))
            except OSError as error:
                errors.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        sink.write(RunEnd(step=99, reason="room again"))
        sink.close()
        print(len(errors), errors[0])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    failed = int(run.stdout.split()[0])
    assert failed > 5
    assert steps == [*range(20 - failed), 99]
    assert "metrics.jsonl: the disk took" in run.stdout


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(LoggingError, match=r"metrics\.jsonl: the jsonl sink cannot open .*direct"):
        JSONL(tmp_path / "metrics.jsonl")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoggingError, match=r"file: the jsonl sink cannot make this folder \(File"):
        JSONL(tmp_path / "file" / "metrics.jsonl")
