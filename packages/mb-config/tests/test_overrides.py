# SPDX-License-Identifier: Apache-2.0
"""Dotted overrides on the command line."""

from __future__ import annotations

import pytest
from mb_config import ConfigContainer, ConfigError, LoRA, MockDatasetConfig


def one(override: str) -> ConfigContainer:
    return ConfigContainer().override(override)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1", 1.0), ("1.5E3", 1500.0), (".5", 0.5), ("0", 0.0),
    ],
)  # fmt: skip
def test_floats(text, value):
    got = one(f"optimizer.lr={text}").optimizer.lr
    assert got == value
    assert type(got) is float


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.micro_batch_size=4", "train.micro_batch_size", 4),
        ("train.train_tokens=2e9", "train.train_tokens", 2_000_000_000),
        ("train.rampup_batch_size=[8, 8, 100]", "train.rampup_batch_size", [8, 8, 100]),
        ("model.window_size=[128, 0]", "model.window_size", (128, 0)),
        ("train.manual_gc=true", "train.manual_gc", True),
        ("checkpoint.save=null", "checkpoint.save", None),
        ("checkpoint.save=", "checkpoint.save", None),
        ("checkpoint.save='null'", "checkpoint.save", "null"),
        ("checkpoint.save=a=b", "checkpoint.save", "a=b"),
        ("checkpoint.save=s3://bucket/run", "checkpoint.save", "s3://bucket/run"),
        ("logger.run_name=12:30", "logger.run_name", "12:30"),
        ("logger.run_name=no", "logger.run_name", "no"),
        ("logger.run_name=2024-01-01", "logger.run_name", "2024-01-01"),
        ("+train.micro_batch_size=4", "train.micro_batch_size", 4),
        (" train.micro_batch_size = 4 ", "train.micro_batch_size", 4),
    ],
)
def test_values_are_yaml(override, path, value):
    section, name = path.split(".")
    got = getattr(getattr(one(override), section), name)
    assert got == value
    assert type(got) is type(value)


def test_the_original_stays_as_it_was(small):
    before = small.to_dict()
    small.override("model.megatron.a=1", "train.train_iters=3", "~dataset")
    assert small.to_dict() == before


def test_a_section_that_is_none_is_made():
    assert one("peft.rank=8").peft == LoRA(rank=8)


def test_a_named_precision_becomes_the_section_it_stands_for():
    made = one("mixed_precision=bf16_mixed").override("mixed_precision.grad_reduce_in_fp32=false")
    assert (made.mixed_precision.bf16, made.mixed_precision.grad_reduce_in_fp32) == (True, False)


def test_type_switches_the_variant():
    assert one("dataset.type=mock").dataset == MockDatasetConfig()


def test_the_same_type_keeps_the_fields(small):
    assert small.override("dataset.type=text").dataset == small.dataset


def test_a_mapping_sets_several_fields_and_keeps_the_others(small):
    made = small.override("model={num_layers: 8, hidden_size: 128}")
    assert (made.model.num_layers, made.model.hidden_size, made.model.seq_length) == (8, 128, 32)


def test_entries_of_mappings_are_set_and_unset(small):
    made = small.override("model.megatron.mtp_num_layers=1", "env_vars.NCCL_DEBUG=INFO")
    assert made.model.megatron == {"mtp_num_layers": 1}
    assert made.env_vars == {"NCCL_DEBUG": "INFO"}
    assert made.override("~model.megatron.mtp_num_layers").model.megatron == {}


def test_a_tilde_puts_the_default_back(small):
    small.peft = LoRA()
    assert small.override("~peft").peft is None
    assert small.override("~model.num_layers").model.num_layers == 0
    assert small.override("~model").model == ConfigContainer().model


def test_later_overrides_win():
    assert one("train.train_iters=1").override("train.train_iters=2").train.train_iters == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lr=1", (r"override 'train.lr=1': train.lr=1: unknown key 'lr' in 'train'; did you"
         r" mean optimizer.lr\?")),
        ("train.train_iter=1", r"did you mean 'train_iters'\?"),
        ("trian.train_iters=1", r"unknown section 'trian'; did you mean 'train'\?"),
        ("train.train_iters=many", "train.train_iters='many': must be an int or null, not a string"),
        ("train.train_iters=1.5", "must be an int or null, not a number"),
        ("train.manual_gc=1", "must be true or false, not an int"),
        ("model.normalization=rms", "must be one of 'RMSNorm', 'LayerNorm'"),
        ("train.micro_batch_size=0", "must be >= 1"),
        ("dataset.type=jsonl", "dataset.type='jsonl': must be one of indexed, mock, sft, text"),
        ("train.train_iters", "must look like section.field=value"),
        ("=3", "must look like section.field=value"),
        ("train.train_iters=[1", "is not a YAML value"),
        ("mixed_precision=3", "must be a string or a MixedPrecisionConfig or null"),
        ("~peff", r"no 'peff'; did you mean 'peft'\?"),
        ("~model.megatron.x", "no 'x' in 'model.megatron'"),
        ("model=3", "model=3: must be a mapping"),
        ("train.micro_batch_size.x=1", "must be an int, not a dict"),
    ],
)  # fmt: skip
def test_a_bad_override_names_itself_and_the_remedy(override, says):
    with pytest.raises(ConfigError, match=says) as caught:
        one(override)
    assert repr(override) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_precision_name_cannot_be_refined():
    with pytest.raises(ConfigError, match="unknown name 'bf17_mixed'; did you mean 'bf16_mixed'"):
        one("mixed_precision=bf17_mixed").override("mixed_precision.fp8=hybrid")
