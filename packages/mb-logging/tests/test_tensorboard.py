# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard itself reads back is what was written."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
from mb_config.records import RunInfo
from mb_logging import TensorBoard
from mb_logging.testing import check_sink, sample_events

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder):
    accumulator = event_accumulator.EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def points(accumulator, tag):
    """Return ``(step, value)`` pairs of scalars, in either form TensorBoard keeps them in."""
    if tag in accumulator.Tags()["scalars"]:
        return [(e.step, e.value) for e in accumulator.Scalars(tag)]
    return [(e.step, e.tensor_proto.float_val[0]) for e in accumulator.Tensors(tag)]


def write(folder, events):
    sink = TensorBoard(folder)
    for event in events:
        sink.write(event)
    sink.close()


def test_it_is_a_sink(tmp_path):
    check_sink(lambda: TensorBoard(tmp_path))


def test_tensorboard_reads_back_every_number(tmp_path, step_event):
    write(tmp_path, sample_events())
    found = read(tmp_path)
    assert points(found, "train/loss") == [(1, math.inf), (2, 5.5)]
    assert points(found, "train/learning_rate") == [
        (1, pytest.approx(1e-4)),
        (2, pytest.approx(2e-4)),
    ]
    assert points(found, "train/loss_scale") == [(1, 65536.0)]
    (step, norm) = points(found, "train/grad_norm")[0]
    assert step == 2
    assert math.isnan(norm)
    assert points(found, "train/accuracy") == [(2, 0.25)]
    assert points(found, "train/consumed_tokens") == [(1, 256.0), (2, 512.0)]
    assert points(found, "eval/validation/loss") == [(2, pytest.approx(5.4))]
    assert points(found, "eval/validation/perplexity") == [(2, pytest.approx(221.4))]
    assert points(found, "checkpoint/seconds") == [(2, 1.0)]


def test_the_run_and_its_configuration_are_texts(tmp_path):
    write(tmp_path, sample_events())
    found = read(tmp_path)
    config = found.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert '"num_layers": 2' in config
    assert all(line.startswith("    ") for line in config.splitlines())
    assert (
        "| parameters | 1,234,567 |" in found.Tensors("run")[0].tensor_proto.string_val[0].decode()
    )
    assert found.SummaryMetadata("config").plugin_data.plugin_name == "text"


def test_mfu_is_written_where_the_peak_of_the_device_is_known(tmp_path, step_event):
    info = RunInfo(run_name="r", device="NVIDIA H100 80GB HBM3")
    write(tmp_path, [info, step_event(1, tflops_per_device=494.7)])
    assert points(read(tmp_path), "train/mfu") == [(1, pytest.approx(0.5))]


def test_steps_that_a_resumed_run_does_again_are_shown_once(tmp_path, step_event):
    write(tmp_path, [RunInfo(run_name="r"), *(step_event(s, loss=9.0) for s in range(1, 7))])
    again = [step_event(s, loss=1.0) for s in range(5, 8)]
    write(tmp_path, [RunInfo(run_name="r", start_step=4), *again])
    found = points(read(tmp_path), "train/loss")
    assert found == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 9.0), (5, 1.0), (6, 1.0), (7, 1.0)]


def test_an_evaluation_is_on_disk_at_once(tmp_path):
    sink = TensorBoard(tmp_path)
    for event in sample_events()[:4]:
        sink.write(event)
    assert points(read(tmp_path), "eval/validation/loss")
    sink.close()


def test_writers_of_one_moment_do_not_share_a_file(tmp_path):
    sinks = [TensorBoard(tmp_path) for _ in range(20)]
    for sink in sinks:
        sink.close()
    assert len({sink.path for sink in sinks}) == 20


def test_neither_torch_nor_tensorflow_is_imported_even_where_installed(tmp_path):
    for name in ("tensorflow", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported')")
    code = """
        import sys
        from mb_logging import TensorBoard
        from mb_logging.testing import sample_events
        sink = TensorBoard("events")
        for event in sample_events():
            sink.write(event)
        sink.close()
        assert not {"torch", "tensorflow"} & set(sys.modules)
    """
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, '.')\n{textwrap.dedent(code)}",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert points(read(tmp_path / "events"), "train/loss")[-1] == (2, 5.5)
