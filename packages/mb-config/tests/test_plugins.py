# SPDX-License-Identifier: Apache-2.0
"""Plugins are found by entry point; a stranger's section works like one of ours."""

from __future__ import annotations

import sys

import pytest
from mb_config import ConfigContainer, ConfigError, PluginError, json_schema, plugins

STRANGER = '''
from __future__ import annotations
from pathlib import Path
from typing import TYPE_CHECKING
import enum
import attrs
if TYPE_CHECKING:
    from nowhere import Columns

class Mode(enum.Enum):
    FAST = "fast"
    SAFE = "safe"

@attrs.define(kw_only=True)
class Inner:
    depth: int = 1

@attrs.define(kw_only=True)
class ParquetConfig:
    """Rows of parquet files.

    Attributes:
        folder: Where they are.
    """

    folder: Path = Path("data")
    mode: Mode = Mode.FAST
    inner: Inner = attrs.field(factory=Inner)
    columns: Columns = "all"
    limit: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    seq_length: int | None = None
'''


def install(folder, name, module_text, entries):
    """Put a package with entry points into *folder*, as an installer does."""
    (folder / f"{name}.py").write_text(module_text)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path, with lookups forgotten before and after."""
    monkeypatch.syspath_prepend(tmp_path)
    plugins._entry_points.cache_clear()
    plugins.load.cache_clear()
    yield tmp_path
    plugins._entry_points.cache_clear()
    plugins.load.cache_clear()
    for name in ("stranger", "broken", "rival"):
        sys.modules.pop(name, None)


def test_our_own_variants_are_registered_like_strangers():
    assert {"mock", "text"} <= set(plugins.names("mb.dataset_configs"))
    assert "lora" in plugins.names("mb.peft_configs")
    assert plugins.load("mb.peft_configs", "lora").__name__ == "LoRA"


def test_names_do_not_import(site):
    install(site, "broken", "raise RuntimeError", "[mb.metric_sinks]\nbroken = broken:sink\n")
    assert "broken" in plugins.names("mb.metric_sinks")
    assert "broken" not in sys.modules


def test_a_missing_name_says_what_is_there_and_what_to_install():
    with pytest.raises(PluginError, match=r"no 'nope' in 'mb.checkpointers'.*mb-engine\[ckpt\]"):
        plugins.load("mb.checkpointers", "nope")
    with pytest.raises(PluginError, match=r"which has nothing; install the package that has it"):
        plugins.load("mb.no_such_group", "nope")


def test_two_claimants_are_refused(site):
    entry = "[mb.metric_sinks]\nmine = {}:sink\n"
    install(site, "stranger", "sink = 1", entry.format("stranger"))
    install(site, "rival", "sink = 2", entry.format("rival"))
    with pytest.raises(
        PluginError, match=r"claimed by rival:sink \(rival\) and stranger:sink \(stranger\)"
    ):
        plugins.load("mb.metric_sinks", "mine")


def test_a_plugin_that_cannot_be_imported_says_so(site):
    install(site, "broken", "import no_such_module", "[mb.metric_sinks]\nbroken = broken:sink\n")
    with pytest.raises(PluginError, match="cannot be imported: No module named 'no_such_module'"):
        plugins.load("mb.metric_sinks", "broken")


class TestAStrangersDataset:
    @pytest.fixture(autouse=True)
    def _installed(self, site):
        entries = "[mb.dataset_configs]\nparquet = stranger:ParquetConfig\n"
        install(site, "stranger", STRANGER, entries)

    def test_comes_back_from_a_file(self, small, tmp_path):
        config = small.override(
            "dataset.type=parquet", "dataset.mode=safe", "dataset.inner.depth=3"
        )
        assert type(config.dataset).__name__ == "ParquetConfig"
        assert config.dataset.mode.value == "safe"
        for kind in ("yaml", "json", "toml"):
            path = tmp_path / f"run.{kind}"
            getattr(config, f"to_{kind}")(path)
            assert getattr(ConfigContainer, f"from_{kind}")(path) == config

    def test_is_resolved(self, small):
        resolved = small.override("dataset.type=parquet").finalize(1)
        assert resolved.dataset.seq_length == 32
        assert resolved.finalize(1) == resolved

    def test_is_explained_and_compared(self, small):
        config = small.override("dataset.type=parquet", "dataset.inner.depth=3")
        assert config.explain("dataset.inner.depth").startswith(
            "dataset.inner.depth = 3, from over"
        )
        assert "dataset.inner" in {d.field for d in small.diff(config)}

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ({"folders": "x"}, r"dataset.folders='x': unknown key 'folders'.*'folder'"),
            ({"folder": 3}, "dataset.folder=3: must be a string"),
            ({"limit": "3"}, "dataset.limit='3': must be an int"),
            ({"limit": 0}, "'limit' must be >= 1"),
            ({"inner": {"deep": 1}}, "dataset.inner.deep=1: unknown key"),
            ({"mode": "slow"}, "dataset.mode='slow': must be one of 'fast', 'safe'"),
        ],
    )
    def test_is_checked_like_ours(self, data, says):
        with pytest.raises(ConfigError, match=says):
            ConfigContainer.from_dict({"dataset": {"type": "parquet", **data}})

    def test_is_in_the_schema(self):
        options = json_schema()["properties"]["dataset"]["anyOf"]
        mine = next(o for o in options if o["properties"]["type"]["const"] == "parquet")
        assert mine["properties"]["folder"]["description"] == "Where they are."
        assert mine["properties"]["mode"]["enum"] == ["fast", "safe"]


def test_an_unregistered_section_can_be_logged_but_not_read_back(small):
    import attrs

    @attrs.define
    class Mine:
        seq_length: int | None = None

    small.dataset = Mine()
    data = small.to_dict()
    assert data["dataset"]["type"].endswith("Mine")
    with pytest.raises(
        ConfigError, match=r"choose one, or register yours under 'mb.dataset_configs"
    ):
        ConfigContainer.from_dict(data)
