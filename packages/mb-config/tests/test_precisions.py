# SPDX-License-Identifier: Apache-2.0
"""Precision recipes of one's own beside the built-in ones."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mb_config import (
    ConfigContainer,
    ConfigError,
    MixedPrecisionConfig,
    PluginError,
    json_schema,
    plugins,
    precision_names,
    precisions,
    register_precision,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(precisions, "_REGISTERED", {})


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with two recipes, as pip would have installed it."""
    info = tmp_path / "lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mb.precision_recipes]\nlab_half = lab_recipes:HALF\nlab-made = lab_recipes:make\n"
        "lab_wrong = lab_recipes:WRONG\n"
    )
    (tmp_path / "lab_recipes.py").write_text(
        "from mb_config import MixedPrecisionConfig\n"
        "HALF = MixedPrecisionConfig(bf16=True, grad_reduce_in_fp32=False)\n"
        "def make():\n    return MixedPrecisionConfig(fp16=True)\n"
        "WRONG = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._entry_points.cache_clear()
    plugins.load.cache_clear()
    yield
    sys.modules.pop("lab_recipes", None)
    plugins._entry_points.cache_clear()
    plugins.load.cache_clear()


def test_a_registered_name_is_applied_like_a_built_in_one(small):
    register_precision("ours", MixedPrecisionConfig(bf16=True, grad_reduce_in_fp32=False))
    resolved = small.override("mixed_precision=ours").finalize(1)
    assert (resolved.model.bf16, resolved.optimizer.params_dtype) == (True, "bfloat16")
    assert resolved.ddp.grad_reduce_in_fp32 is False
    assert resolved.explain("mixed_precision.bf16").endswith("derived: the name 'ours'")


def test_a_function_makes_a_new_section_each_time(small):
    register_precision("made", lambda: MixedPrecisionConfig(bf16=True))
    one, two = (small.override("mixed_precision=made").finalize(1) for _ in range(2))
    assert one.mixed_precision == two.mixed_precision
    assert one.mixed_precision is not two.mixed_precision


def test_a_registered_name_can_be_refined(small):
    register_precision("ours", MixedPrecisionConfig(bf16=True, grad_reduce_in_fp32=False))
    made = small.override("mixed_precision=ours", "mixed_precision.params_dtype=float32")
    assert made.mixed_precision == MixedPrecisionConfig(
        bf16=True, grad_reduce_in_fp32=False, params_dtype="float32"
    )


def test_a_taken_name_is_refused():
    with pytest.raises(PluginError, match="'bf16-mixed' exists already; choose another name"):
        register_precision("bf16-mixed", MixedPrecisionConfig())
    register_precision("ours", MixedPrecisionConfig(bf16=True))
    register_precision("ours", MixedPrecisionConfig(bf16=True))  # a module loaded twice
    with pytest.raises(PluginError, match="exists already"):
        register_precision("ours", MixedPrecisionConfig(fp16=True))


def test_an_installed_package_offers_recipes(installed, small):
    assert {"lab_half", "lab_made"} < set(precision_names())
    assert "lab_recipes" not in sys.modules  # names alone import nothing
    assert small.override("mixed_precision=lab-half").finalize(1).ddp.grad_reduce_in_fp32 is False
    assert small.override("mixed_precision=lab_made").finalize(1).model.fp16 is True
    enum = json_schema()["properties"]["mixed_precision"]["anyOf"][0]["enum"]
    assert {"lab_half", "lab-half"} < set(enum)
    with pytest.raises(
        PluginError, match="'lab_wrong' is a int; it must be a MixedPrecisionConfig"
    ):
        small.override("mixed_precision=lab_wrong").finalize(1)


def test_an_unknown_name_says_which_there_are(small):
    register_precision("ours_exactly", MixedPrecisionConfig(bf16=True))
    with pytest.raises(ConfigError, match=r"must be one of fp32, .*, ours_exactly; did you mean"):
        small.override("mixed_precision=ours_exactl").finalize(1)


def test_no_name_needs_torch():
    code = (
        "import sys; from mb_config import ConfigContainer, precision_names\n"
        "c = ConfigContainer(mixed_precision='bf16_with_nvfp4_mixed'); precision_names()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ConfigContainer().mixed_precision is None
