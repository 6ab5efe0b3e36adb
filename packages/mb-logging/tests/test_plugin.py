# SPDX-License-Identifier: Apache-2.0
"""Names in a configuration become sinks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mb_config import ConfigContainer, ConfigError, PluginError, plugins
from mb_config.errors import UserError
from mb_config.records import RunInfo
from mb_logging import JSONL, Console, Plot, TensorBoard, read_events
from mb_logging.plugin import make_recorder
from mb_logging.testing import sample_events


def config(**logger):
    container = ConfigContainer()
    for name, value in logger.items():
        setattr(container.logger, name, value)
    return container


def sinks_of(recorder):
    return [guard.sink for guard in recorder._sinks]


def test_the_entry_points_are_there():
    assert plugins.load("mb.callbacks", "recorder") is make_recorder
    assert {"console", "jsonl", "tensorboard", "plot"} <= set(plugins.names("mb.metric_sinks"))


def test_the_console_is_the_default():
    with make_recorder(config()) as recorder:
        assert [type(s) for s in sinks_of(recorder)] == [Console]
    with make_recorder(config(sinks=[])) as recorder:
        assert sinks_of(recorder) == []


def test_all_sinks_write_below_the_log_folder(tmp_path, capsys):
    names = ["console", "jsonl", "tensorboard", "plot", "jsonl"]
    with make_recorder(config(sinks=names, log_dir=str(tmp_path / "run"))) as recorder:
        assert [type(s) for s in sinks_of(recorder)] == [Console, JSONL, TensorBoard, Plot]
        for event in sample_events():
            recorder.on_event(event)
    assert repr(list(read_events(tmp_path / "run" / "metrics.jsonl"))) == repr(sample_events())
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert "sample: 1.23 M parameters" in capsys.readouterr().out


def test_the_console_prints_every_report_of_the_engine(step_event, capsys):
    with make_recorder(config()) as recorder:
        recorder.on_event(RunInfo(run_name="r", total_steps=50))
        for step in range(1, 51):
            recorder.on_event(step_event(step))
    assert len(capsys.readouterr().out.splitlines()) == 51


def test_tensorboard_may_have_a_folder_of_its_own(tmp_path):
    with make_recorder(config(sinks=["tensorboard"], tensorboard_dir=str(tmp_path / "tb"))):
        pass
    assert len(list((tmp_path / "tb").iterdir())) == 1


@pytest.mark.parametrize("name", ["jsonl", "plot", "tensorboard"])
def test_a_sink_that_needs_a_folder_says_so(name):
    with pytest.raises(ConfigError, match=f"^logger.log_dir=None: the {name} sink .* set logger"):
        make_recorder(config(sinks=["console", name]))


def test_an_unknown_sink_names_those_there_are():
    with pytest.raises(PluginError, match=r"no 'wandb' in 'mb\.metric_sinks', which has console"):
        make_recorder(config(sinks=["wandb"]))


def test_sinks_made_before_one_fails_are_closed(tmp_path, monkeypatch):
    closed = []
    close = JSONL.close
    monkeypatch.setattr(JSONL, "close", lambda self: closed.append(self.path.name) or close(self))
    with pytest.raises(PluginError, match="no 'nowhere'"):
        make_recorder(config(sinks=["jsonl", "nowhere"], log_dir=str(tmp_path)))
    assert closed == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "module"), [("plot", "matplotlib"), ("tensorboard", "tensorboard")]
)
def test_a_missing_package_is_one_line_with_what_to_install(name, module, tmp_path, monkeypatch):
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=rf"needs {module}, .* pip install \"mb-logging\[{name}\]\""
    ) as e:
        make_recorder(config(sinks=[name], log_dir=str(tmp_path)))
    assert "\n" not in str(e.value)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, mb_logging, mb_logging.plugin, mb_logging.testing, mb_logging.cli\n"
        "heavy = {'torch', 'numpy', 'rich', 'matplotlib', 'tensorboard', 'mb_engine', 'mb_ckpt'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
