# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema accepts what files may hold and refuses what they may not."""

from __future__ import annotations

import jsonschema
import pytest
from mb_config import ConfigContainer, ConfigError, json_schema

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"train": {"train_iters": 5, "rampup_batch_size": [1, 2, 3]}},
        {"mixed_precision": "bf16_mixed"},
        {"mixed_precision": "bf16-mixed"},
        {"mixed_precision": {"bf16": True}},
        {"mixed_precision": None, "peft": None},
        {"peft": {"type": "lora", "rank": 4}},
        {"dataset": {"type": "mock", "pattern": "random"}},
        {"model": {"window_size": [1, 2], "megatron": {"x": [1, {"y": None}]}}},
        {"model": {"moe_layer_freq": [0, 1], "cp_comm_type": ["p2p"]}},
        {"env_vars": {"A": 1, "B": "x", "C": True, "D": 0.5}},
    ],
)
def test_what_it_accepts_can_be_read(data):
    VALIDATOR.validate(data)
    ConfigContainer.from_dict(data)


@pytest.mark.parametrize(
    "data",
    [
        {"trian": {}},
        {"train": {"lr": 1}},
        {"train": {"train_iters": "5"}},
        {"train": {"micro_batch_size": 0}},
        {"train": {"iterations_to_skip": [0]}},
        {"train": {"exit_signal": "SIGKILL"}},
        {"model": {"hidden_dropout": 1.0}},
        {"model": {"window_size": [1]}},
        {"model": None},
        {"peft": {"rank": 4}},
        {"peft": {"type": "dora"}},
        {"dataset": {"type": "mock", "path": ["x"]}},
        {"mixed_precision": 3},
        {"env_vars": {"A": None}},
    ],
)
def test_what_it_refuses_cannot_be_read(data):
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(ConfigError):
        ConfigContainer.from_dict(data)


def test_it_has_types_choices_ranges_defaults_and_descriptions():
    fields = json_schema()["$defs"]["OptimizerConfig"]["properties"]
    assert fields["adam_beta1"] == {
        "type": "number",
        "minimum": 0,
        "exclusiveMaximum": 1,
        "description": "Decay of the first moment.",
        "default": 0.9,
    }
    assert fields["optimizer"]["enum"] == ["adam", "sgd", "muon"]


def test_derived_fields_are_read_only():
    fields = json_schema()["$defs"]["TrainingConfig"]["properties"]
    read_only = {name for name, schema in fields.items() if schema.get("readOnly")}
    assert read_only == {"data_parallel_size", "num_microbatches"}
