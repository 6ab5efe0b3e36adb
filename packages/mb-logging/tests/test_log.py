# SPDX-License-Identifier: Apache-2.0
"""Lines of the log say who, in which run and when."""

from __future__ import annotations

import io
import json
import logging

import pytest
from mb_config.records import RunInfo
from mb_logging import configure_logging


@pytest.fixture
def name(request):
    """Return the name of a logger that is as it was afterwards."""
    yield f"test.{request.node.name}"
    logger = logging.getLogger(f"test.{request.node.name}")
    logger.handlers.clear()


def test_a_line_says_rank_run_and_step(name, step_event):
    stream = io.StringIO()
    context = configure_logging(logger=name, stream=stream, rank=0, level="DEBUG")
    log = logging.getLogger(f"{name}.part")
    log.debug("hello")
    context.on_event(RunInfo(run_name="run7", start_step=100))
    log.info("resumed")
    context.on_event(step_event(120))
    log.info("going on")
    first, second, third = stream.getvalue().splitlines()
    assert f"DEBUG [rank 0] {name}.part: hello" in first
    assert f"INFO [run7 rank 0 step 100] {name}.part: resumed" in second
    assert "[run7 rank 0 step 120]" in third


def test_other_ranks_only_warn(name):
    stream = io.StringIO()
    configure_logging(logger=name, stream=stream, rank=3)
    log = logging.getLogger(name)
    log.info("not shown")
    log.warning("shown")
    assert "[rank 3]" in stream.getvalue()
    assert stream.getvalue().count("shown") == 1


def test_chosen_ranks_or_all_may_speak(name):
    for ranks in ([1, 3], None):
        stream = io.StringIO()
        configure_logging(logger=name, stream=stream, rank=3, ranks=ranks)
        logging.getLogger(name).info("shown")
        assert "shown" in stream.getvalue()


def test_the_rank_is_torchruns(name, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    assert configure_logging(logger=name).rank == 5
    monkeypatch.delenv("RANK")
    assert configure_logging(logger=name).rank == 0


def test_json_lines_carry_fields_and_the_exception(name):
    stream = io.StringIO()
    context = configure_logging(
        logger=name, stream=stream, rank=2, run_id="r", as_json=True, ranks=None
    )
    context.step = 9
    try:
        raise KeyError("lost")
    except KeyError:
        logging.getLogger(name).exception("failed on %s", "\u00fc")
    data = json.loads(stream.getvalue())
    assert (data["level"], data["rank"], data["run_id"], data["step"]) == ("ERROR", 2, "r", 9)
    assert (data["logger"], data["message"]) == (name, "failed on ü")
    assert "KeyError: 'lost'" in data["exception"]
    assert data["time"] > 1e9


def test_a_second_call_replaces_the_first_and_spares_strangers(name):
    stranger = logging.NullHandler()
    logging.getLogger(name).addHandler(stranger)
    old, new = io.StringIO(), io.StringIO()
    configure_logging(logger=name, stream=old)
    configure_logging(logger=name, stream=new)
    logging.getLogger(name).info("once")
    assert (old.getvalue(), new.getvalue().count("once")) == ("", 1)
    assert stranger in logging.getLogger(name).handlers


def test_an_unknown_level_is_refused_before_anything_changes(name):
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging(logger=name, level="LOUD")
    assert logging.getLogger(name).handlers == []
