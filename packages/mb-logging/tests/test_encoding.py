# SPDX-License-Identifier: Apache-2.0
"""Records survive JSON, and what is read never depends on a broken line."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mb_config.records import EvalEvent, RunEnd, RunInfo, SaveEvent, StepEvent
from mb_logging.encoding import decode, decode_stamped, encode, read_events
from mb_logging.errors import LoggingError
from mb_logging.testing import sample_events

NUMBER = st.floats()
COUNT = st.integers(0, 2**63)
TEXT = st.text()
METRICS = st.dictionaries(TEXT, NUMBER, max_size=4)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
EVENTS = st.one_of(
    st.builds(
        RunInfo,
        run_name=TEXT,
        config=st.dictionaries(TEXT, PLAIN, max_size=4),
        layout=TEXT,
        world_size=COUNT,
        device=TEXT,
        start_step=COUNT,
        total_steps=st.none() | COUNT,
        sequence_length=COUNT,
        num_parameters=COUNT,
        flops_per_token=NUMBER,
        versions=st.dictionaries(TEXT, TEXT, max_size=3),
    ),
    st.builds(
        StepEvent,
        step=COUNT,
        consumed_samples=COUNT,
        consumed_tokens=COUNT,
        loss=NUMBER,
        learning_rate=NUMBER,
        weight_decay=NUMBER,
        grad_norm=st.none() | NUMBER,
        loss_scale=st.none() | NUMBER,
        global_batch_size=COUNT,
        skipped_steps=COUNT,
        seconds=NUMBER,
        tokens_per_second=NUMBER,
        tflops_per_device=NUMBER,
        metrics=METRICS,
    ),
    st.builds(
        EvalEvent,
        step=COUNT,
        name=TEXT,
        loss=NUMBER,
        perplexity=NUMBER,
        num_tokens=COUNT,
        seconds=NUMBER,
        metrics=METRICS,
    ),
    st.builds(
        SaveEvent,
        step=COUNT,
        path=TEXT,
        status=st.sampled_from(["started", "saved", "failed"]),
        seconds=NUMBER,
        error=TEXT,
    ),
    st.builds(RunEnd, step=COUNT, reason=TEXT, seconds=NUMBER, exit_code=st.integers(0, 255)),
)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@given(EVENTS)
def test_every_record_comes_back_as_it_was(event):
    line = encode(event, time=12.5)
    assert "\n" not in line
    json.loads(line, parse_constant=refuse)
    back = decode_stamped(line)
    assert back.time == 12.5
    # By repr: nan is not equal to itself, and -0.0 is equal to 0.0.
    assert repr(back.event) == repr(event)
    if isinstance(event, RunInfo):
        assert back.event.config == event.config


def test_numbers_that_json_lacks_are_strings():
    event = sample_events()[1]
    data = json.loads(encode(event, time=0.0))
    assert (data["kind"], data["loss"]) == ("step", "inf")
    assert decode(encode(event, time=0.0)).loss == math.inf


def test_what_is_not_plain_is_written_as_a_number_or_a_word():
    class Scalar:
        def __float__(self):
            return 0.25

    event = RunInfo(run_name="x", config={1: (Scalar(), float("nan"), complex)})
    config = json.loads(encode(event, time=0.0), parse_constant=refuse)["config"]
    assert config == {"1": [0.25, "nan", "<class 'complex'>"]}


def test_whole_numbers_of_other_libraries_stay_exact():
    class Int64:
        def __index__(self):
            return 2**53 + 1

        def __float__(self):
            return float(2**53)

    class NotWhole:
        def __index__(self):
            raise TypeError("only integer scalars can be an index")

        def __float__(self):
            return 0.5

    config = {"tokens": Int64(), "ratio": NotWhole()}
    data = json.loads(encode(RunInfo(run_name="x", config=config), time=0.0))
    assert data["config"] == {"tokens": 2**53 + 1, "ratio": 0.5}


def test_fields_of_a_later_version_are_passed_over():
    line = json.dumps({"kind": "end", "time": 1.0, "step": 3, "reason": "r", "new": [1]})
    assert decode(line) == RunEnd(step=3, reason="r")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "3",
        '{"step": 1}',
        '{"kind": "party"}',
        '{"kind": "end"}',
        '{"kind": "eval", "step": 1, "name": "v", "loss": "low", "perplexity": 1.0}',
        '{"kind": "end", "step": 1, "reason": "r", "time": null}',
        '{"kind": ["end"], "step": 1, "reason": "r"}',
        '{"kind": "end", "step": "one", "reason": "r"}',
        '{"kind": "end", "step": 1.5, "reason": "r"}',
        '{"kind": "end", "step": null, "reason": "r"}',
        '{"kind": "end", "step": 1, "reason": 7}',
        '{"kind": "end", "step": 1, "reason": "r", "seconds": [1]}',
        '{"kind": "end", "step": 1, "reason": "r", "seconds": 1' + 400 * "0" + "}",
        '{"kind": "eval", "step": 1, "name": "v", "loss": null, "perplexity": 1.0}',
        '{"kind": "eval", "step": 1, "name": "v", "loss": 1, "perplexity": 1, "metrics": [1]}',
        '{"kind": "eval", "step": 1, "name": "v", "loss": 1, "perplexity": 1, "metrics": {"a": null}}',
    ],
)
def test_what_is_no_record_is_a_value_error(line):
    with pytest.raises(ValueError, match=r"."):
        decode(line)


def test_broken_lines_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [encode(e, time=0.0) for e in sample_events()]
    text = "\n".join([lines[0], '{"kind": "st', lines[1], "", "noise", lines[2], lines[3][:20]])
    path.write_text(text)
    assert repr(list(read_events(path))) == repr(sample_events()[:3])
    assert "metrics.jsonl: 2 lines are no records; line 2 is the first" in caplog.text


def test_a_whole_last_line_counts_without_its_line_end(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text(encode(sample_events()[-1], time=0.0))
    assert list(read_events(path)) == sample_events()[-1:]
    assert not caplog.text


def test_bytes_that_are_no_text_do_not_stop_reading(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\x00\xfe\n" + encode(sample_events()[-1], time=0.0).encode() + b"\n")
    assert list(read_events(path)) == sample_events()[-1:]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LoggingError, match=r"no\.jsonl: cannot be read \(No such file"):
        list(read_events(tmp_path / "no.jsonl"))
