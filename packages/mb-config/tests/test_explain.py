# SPDX-License-Identifier: Apache-2.0
"""explain, diff and fingerprint."""

from __future__ import annotations

import hashlib

import pytest
from mb_config import ConfigContainer, ConfigError


def test_derived_values_show_their_calculation(small):
    config = small.override("train.micro_batch_size=4", "train.global_batch_size=64")
    assert config.finalize(2).explain("train.num_microbatches") == (
        "train.num_microbatches = 8, derived: global_batch_size 64 / (micro_batch_size 4 x"
        " data_parallel_size 2)"
    )


def test_layers_are_chosen_for_what_the_model_asks(small):
    assert small.finalize(1).model.layer_spec == "auto"
    resolved = small.override("model.attn_logit_softcapping=50.0").finalize(1)
    assert resolved.explain("model.layer_spec") == (
        "model.layer_spec = torch, derived: attn_logit_softcapping"
    )


def test_each_source_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 0.0003, min_lr: 0.0001}\n")
    config = ConfigContainer.from_yaml(path).override("train.train_iters=50")
    config.optimizer.clip_grad = 0.5
    assert config.explain("optimizer.min_lr") == f"optimizer.min_lr = 0.0001, from file {path}"
    assert config.explain("optimizer.lr").endswith(f"from file {path}")  # although the default
    assert config.explain("train.train_iters") == (
        "train.train_iters = 50, from override 'train.train_iters=50'"
    )
    assert config.explain("optimizer.clip_grad") == "optimizer.clip_grad = 0.5, set in Python"
    assert config.explain("optimizer.adam_eps") == "optimizer.adam_eps = 1e-08, default"


def test_an_assignment_takes_over_from_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 0.5}\n")
    config = ConfigContainer.from_yaml(path)
    config.optimizer.lr = 0.25
    assert config.explain("optimizer.lr").endswith("set in Python")
    assert config.override("~optimizer.lr").explain("optimizer.lr").endswith("default")


def test_sources_outlast_finalize(small):
    resolved = small.finalize(1)
    assert resolved.explain("model.num_layers").endswith("from override 'model.num_layers=4'")


def test_fields_of_a_named_precision_come_from_the_name(small):
    resolved = small.override("mixed_precision=bf16_mixed").finalize(1)
    assert resolved.explain("mixed_precision.bf16") == (
        "mixed_precision.bf16 = True, derived: the name 'bf16_mixed'"
    )


def test_a_section_has_a_line_for_each_field(small):
    lines = small.finalize(1).explain("rng").splitlines()
    assert lines == [
        "rng.seed = 1234, default",
        "rng.data_parallel_random_init = False, default",
        "rng.te_rng_tracker = False, default",
    ]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("train.microbatches", r"no 'microbatches' in 'train'; did you mean 'num_microbatches'\?"),
        ("trian", r"no 'trian'; did you mean 'train'\?"),
        ("rng.seed.x", "rng.seed has no fields"),
    ],
)
def test_an_unknown_field_is_an_error(path, says):
    with pytest.raises(ConfigError, match=says):
        ConfigContainer().explain(path)


class TestDiff:
    def test_equal_containers_do_not_differ(self, small):
        assert small.diff(small.override()) == ()

    def test_fields_are_named_in_order(self, small):
        other = small.override("optimizer.lr=1", "model.num_layers=8", "model.megatron.a=1")
        assert [str(d) for d in small.diff(other)] == [
            "model.num_layers: 4 -> 8",
            "model.megatron.a: (absent) -> 1",
            "optimizer.lr: 0.0003 -> 1.0",
        ]

    def test_another_variant_differs_by_its_fields(self, small):
        fields = [d.field for d in small.diff(small.override("dataset.type=mock"))]
        assert fields[:2] == ["dataset.type", "dataset.path"]
        assert "dataset.num_samples" in fields

    def test_values_of_another_type_differ(self, small):
        one, two = small.override("env_vars.A=1"), small.override("env_vars.A=true")
        assert [str(d) for d in one.diff(two)] == ["env_vars.A: 1 -> True"]


class TestFingerprint:
    def test_it_is_the_same_for_equal_containers_and_only_those(self, small):
        assert small.fingerprint() == small.override().fingerprint()
        assert small.fingerprint() != small.override("rng.seed=2").fingerprint()

    def test_it_can_look_at_some_sections_only(self, small):
        other = small.override("rng.seed=2")
        assert small.fingerprint("model", "dataset") == other.fingerprint("model", "dataset")
        assert small.fingerprint("rng") != other.fingerprint("rng")

    def test_it_does_not_change_between_versions_and_processes(self):
        text = '{"rng":{"data_parallel_random_init":false,"seed":1234,"te_rng_tracker":false}}'
        expected = hashlib.sha256(text.encode()).hexdigest()[:16]
        assert ConfigContainer().fingerprint("rng") == expected

    def test_an_unknown_section_is_an_error(self, small):
        with pytest.raises(ConfigError, match="no section 'modle'; did you mean 'model'"):
            small.fingerprint("modle")
