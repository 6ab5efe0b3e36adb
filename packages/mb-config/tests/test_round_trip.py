# SPDX-License-Identifier: Apache-2.0
"""Whatever a container holds comes back from every format, value and type."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from mb_config import ConfigContainer, ConfigError, LoRA, json_schema
from mb_config.provenance import leaves, same


def _strategies():
    path = pathlib.Path(__file__).with_name("strategies.py")
    spec = importlib.util.spec_from_file_location("mb_config_strategies", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


strategies = _strategies()
containers = strategies.containers
PROPERTY = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def assert_identical(left: ConfigContainer, right: ConfigContainer) -> None:
    assert left == right
    ours, theirs = dict(leaves(left)), dict(leaves(right))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert same(value, theirs[path]), path


@PROPERTY
@given(containers())
def test_plain_data_comes_back(config):
    assert_identical(ConfigContainer.from_dict(config.to_dict()), config)


@PROPERTY
@given(containers())
def test_plain_data_is_only_what_json_has(config):
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@PROPERTY
@given(containers())
def test_yaml_comes_back(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "c.yaml"
    config.to_yaml(path)
    assert_identical(ConfigContainer.from_yaml(path), config)


@PROPERTY
@given(containers())
def test_json_comes_back(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "c.json"
    config.to_json(path)
    assert_identical(ConfigContainer.from_json(path), config)


@PROPERTY
@given(containers(nulls=False))
def test_toml_comes_back(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "c.toml"
    config.to_toml(path)
    assert_identical(ConfigContainer.from_toml(path), config)


@pytest.mark.parametrize("kind", ["yaml", "json", "toml"])
def test_strings_that_look_like_something_else_stay_strings(tmp_path, kind):
    config = ConfigContainer()
    config.dataset.path = list(strategies.TRICKY_STRINGS)
    config.env_vars = {text: text for text in strategies.TRICKY_STRINGS}
    config.model.megatron = {text: [text, {text: text}] for text in strategies.TRICKY_STRINGS}
    path = tmp_path / f"c.{kind}"
    getattr(config, f"to_{kind}")(path)
    assert_identical(getattr(ConfigContainer, f"from_{kind}")(path), config)


@PROPERTY
@given(containers())
def test_the_schema_accepts_what_a_container_writes(config):
    import jsonschema

    jsonschema.Draft202012Validator(json_schema()).validate(config.to_dict())


@PROPERTY
@given(containers())
def test_other_yaml_readers_see_the_same_strings(config):
    # a YAML 1.1 reader may read our floats as strings, but never a string as something else
    theirs, ours = yaml.safe_load(config.to_yaml()), config.to_dict()
    assert theirs["env_vars"].keys() == ours["env_vars"].keys()
    for name, value in ours["env_vars"].items():
        if isinstance(value, str):
            assert theirs["env_vars"][name] == value


def test_a_resolved_container_comes_back_from_plain_data(small):
    resolved = small.finalize(4)
    back = ConfigContainer.from_dict(resolved.to_dict())
    assert_identical(back, resolved)
    assert_identical(back.finalize(4), resolved)


@pytest.mark.parametrize("kind", ["yaml", "json", "toml"])
def test_a_file_holds_what_was_asked_for_and_fits_other_world_sizes(small, tmp_path, kind):
    small.mixed_precision = "bf16_mixed"
    resolved = small.finalize(4)
    path = tmp_path / f"run.{kind}"
    getattr(resolved, f"to_{kind}")(path)
    back = getattr(ConfigContainer, f"from_{kind}")(path)
    assert_identical(back, small)
    assert back.finalize(4) == resolved
    assert back.finalize(8).train.data_parallel_size == 8


def test_yaml_says_in_comments_what_was_derived(small):
    text = small.finalize(4).to_yaml()
    assert "#   train.num_microbatches = 4, derived: global_batch_size 16 / (micro" in text
    assert "num_microbatches: null" in text


def test_toml_refuses_a_null_inside_a_mapping(small):
    small.model.megatron = {"mtp_num_layers": None}
    with pytest.raises(
        ConfigError, match=r"model\.megatron\.mtp_num_layers=None: TOML has no null"
    ):
        small.to_toml()


def test_variants_carry_their_type(small):
    small.peft = LoRA(rank=4)
    data = small.to_dict()
    assert (data["dataset"]["type"], data["peft"]["type"]) == ("text", "lora")


def test_every_field_that_takes_null_has_null_as_default():
    # otherwise a TOML file, which has no null, could not say it
    for path, value in leaves(ConfigContainer()):
        section, _, name = path.rpartition(".")
        if not section:
            continue
        owner = getattr(ConfigContainer(), section)
        try:
            setattr(owner, name, None)
        except ConfigError:
            continue
        assert value is None, path
