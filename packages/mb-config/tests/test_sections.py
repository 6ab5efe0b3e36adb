# SPDX-License-Identifier: Apache-2.0
"""Sections check what is assigned, say what is wrong, and are documented field by field."""

from __future__ import annotations

import attrs
import pytest
from mb_config import (
    ConfigContainer,
    ConfigError,
    IndexedDatasetConfig,
    LoRA,
    MixedPrecisionConfig,
    MockDatasetConfig,
    SFTDatasetConfig,
    TextDatasetConfig,
    TrainingConfig,
    UserError,
    sections,
)
from mb_config.schema import descriptions
from mb_config.sections.precision import PRECISIONS

CLASSES = [
    ConfigContainer,
    *(c for n in sections.__all__ if attrs.has(c := getattr(sections, n))),
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_field_is_described_and_no_other(cls):
    fields = {a.name for a in attrs.fields(cls) if a.init}
    about = descriptions(cls)
    assert set(about) == fields
    assert all(text.endswith(".") for text in about.values())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_section_can_be_made_without_arguments_and_by_keyword_only(cls):
    assert cls() == cls()
    with pytest.raises(TypeError, match="positional"):
        cls(1)


@pytest.mark.parametrize(
    ("section", "name", "value", "says"),
    [
        ("train", "micro_batch_size", 0, "train.micro_batch_size=0: must be >= 1; choose a value"),
        ("train", "micro_batch_size", "8", "train.micro_batch_size='8': must be an int, not a str"),
        ("train", "micro_batch_size", True, "must be an int, not true or false"),
        ("train", "micro_batch_size", 1.5, "must be an int, not a number"),
        ("train", "manual_gc", 1, "must be true or false, not an int"),
        ("train", "empty_unused_memory_level", 3, "must be one of 0, 1, 2"),
        ("train", "iterations_to_skip", [0], "must be >= 1"),
        ("train", "exit_signal", "SIGKILL", "must be one of 'SIGTERM', 'SIGINT'"),
        ("model", "hidden_dropout", 1, "must be >= 0 and < 1"),
        ("model", "rotary_percent", 1.1, "must be > 0 and <= 1"),
        ("model", "window_size", [1, 2, 3], "must be a list of 2 items, each an int or null"),
        ("model", "megatron", {"a": object()}, "with each value plain data"),
        ("model", "virtual_pipeline_model_parallel_size", 1, "must be >= 2"),
        ("optimizer", "lr", float("nan"), "must be a number"),
        ("optimizer", "lr", -1e-3, "must be >= 0"),
        ("optimizer", "adam_beta2", 1.0, "must be >= 0 and < 1"),
        ("checkpoint", "save", b"x", "must be a string or null, not a bytes"),
        ("checkpoint", "save", "\ud800", "must be a string"),
        ("checkpoint", "most_recent_k", -2, "must be >= -1"),
    ],
)
def test_assignment_is_checked(section, name, value, says):
    config = ConfigContainer()
    before = getattr(getattr(config, section), name)
    with pytest.raises(ConfigError, match=says) as caught:
        setattr(getattr(config, section), name, value)
    assert str(caught.value).startswith(f"{section}.{name}=")
    assert getattr(getattr(config, section), name) == before


def test_construction_is_checked():
    with pytest.raises(ConfigError, match=r"peft\.rank=0: must be >= 1"):
        LoRA(rank=0)


def test_a_section_is_checked():
    with pytest.raises(ConfigError, match=r"model=.*must be a ModelConfig, not a TrainingConfig"):
        ConfigContainer(model=TrainingConfig())


def test_unknown_attributes_are_refused():
    with pytest.raises(AttributeError, match="lerning_rate"):
        ConfigContainer().optimizer.lerning_rate = 1


def test_numbers_that_lose_nothing_are_adapted():
    config = ConfigContainer()
    config.optimizer.lr, config.train.train_tokens, config.model.window_size = 1, 1e9, [4, 0]
    values = (config.optimizer.lr, config.train.train_tokens, config.model.window_size)
    assert values == (1.0, 10**9, (4, 0))
    assert list(map(type, values)) == [float, int, tuple]


def test_containers_share_no_state():
    one, two = ConfigContainer(), ConfigContainer()
    one.model.megatron["a"] = 1
    one.dataset.path.append("x")
    assert (two.model.megatron, two.dataset.path) == ({}, [])


def test_a_dataset_of_ones_own_can_be_put_in():
    @attrs.define
    class Mine:
        seq_length: int | None = None

    assert isinstance(ConfigContainer(dataset=Mine()).dataset, Mine)
    with pytest.raises(ConfigError, match="must be a DatasetConfig, not a dict"):
        ConfigContainer(dataset={"type": "text"})


def test_a_section_shows_what_is_not_default():
    config = ConfigContainer().override("train.train_iters=3", "dataset.type=mock", "peft.rank=3")
    assert repr(config) == (
        "ConfigContainer(train=TrainingConfig(train_iters=3), dataset=MockDatasetConfig(),"
        " peft=LoRA(rank=3))"
    )
    assert repr(ConfigContainer()) == "ConfigContainer()"


def test_errors_are_for_users():
    assert issubclass(ConfigError, UserError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("name", PRECISIONS)
def test_named_precisions_make_sections(name):
    made = MixedPrecisionConfig(**PRECISIONS[name])
    assert made.bf16 == name.startswith(("bf16", "nemotron", "nanov2"))
    assert made.fp16 == name.startswith("fp16")
    assert bool(made.fp8) == ("fp8" in name)
    assert bool(made.fp4) == ("fp4" in name)


def test_both_datasets_have_what_every_dataset_has():
    shared = set(sections.DatasetConfig.__annotations__)
    for cls in (TextDatasetConfig, MockDatasetConfig, SFTDatasetConfig, IndexedDatasetConfig):
        assert shared <= {a.name for a in attrs.fields(cls)}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_annotation_of_ours_can_be_evaluated(cls):
    from typing import Any

    from mb_config._types import hints

    assert [name for name, hint in hints(cls).items() if hint is Any] == []
