# SPDX-License-Identifier: Apache-2.0
"""Files that cannot be used say why in one line for each problem."""

from __future__ import annotations

import pytest
from mb_config import ConfigContainer, ConfigError, yaml_text


@pytest.fixture
def written(tmp_path):
    def write(text: str, suffix: str = "yaml"):
        path = tmp_path / f"run.{suffix}"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_partial_file_leaves_the_rest_at_its_defaults(written):
    config = ConfigContainer.from_yaml(written("train:\n  train_iters: 50\n"))
    assert config == ConfigContainer().override("train.train_iters=50")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}"])
def test_an_empty_file_is_all_defaults(written, text):
    assert ConfigContainer.from_yaml(written(text)) == ConfigContainer()


def test_every_problem_of_a_file_is_listed_with_its_path(written):
    path = written(
        "train: {lr: 1, micro_batch_size: x}\nmodle: {}\ndataset: {type: text, pth: a}\npeft: {}\n"
    )
    with pytest.raises(ConfigError) as caught:
        ConfigContainer.from_yaml(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 5 problems in the configuration:",
        "  train.lr=1: unknown key 'lr' in 'train'; did you mean optimizer.lr?",
        "  train.micro_batch_size='x': must be an int, not a string; give an int",
        "  modle={}: unknown key 'modle'; did you mean 'model'?",
        "  dataset.pth='a': unknown key 'pth' in 'dataset'; did you mean 'path'?",
        "  peft.type=missing: must be one of lora; add 'type: lora'",
    ]
    assert [v.field for v in caught.value.violations] == [
        "train.lr", "train.micro_batch_size", "modle", "dataset.pth", "peft.type",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "text", "says"),
    [
        ("yaml", "train: [1", r"not valid YAML: line 1, column 10: "),
        ("yaml", "train:\n  a: 1\n  a: 2\n", "line 3, column 3: the key 'a' is given twice"),
        ("yaml", "- a\n", "holds a list; a configuration is a mapping"),
        ("yaml", "train: !!python/object:os.system {}\n", "not valid YAML: .*could not determine"),
        ("yaml", "train: {<<: {train_iters: 3}}", "unknown key '<<'"),
        ("json", '{"train": }', "not valid JSON: Expecting value"),
        ("json", '{"train": {}, "train": {}}', "the key 'train' is given twice"),
        ("json", '{"optimizer": {"lr": NaN}}', "NaN is no JSON number"),
        ("json", "3", "holds a int"),
        ("toml", "a = ", "not valid TOML: Invalid value"),
        ("toml", "[train]\ntrain_iters = 'x'", "train.train_iters='x': must be an int or null"),
        ("yaml", "train: 3", "train=3: must be a mapping; give its fields below it"),
        ("yaml", "optimizer: {lr: .nan}", "optimizer.lr=nan: must be a number"),
        ("yaml", "1: 2", "unknown key '1'"),
    ],
)
def test_a_bad_file_is_named(written, suffix, text, says):
    path = written(text, suffix)
    with pytest.raises(ConfigError, match=says) as caught:
        getattr(ConfigContainer, f"from_{suffix}")(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file; check the path"):
        ConfigContainer.from_yaml(tmp_path / "nowhere.yaml")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read .*give a YAML file"):
        ConfigContainer.from_yaml(tmp_path)


def test_bytes_that_are_no_text_are_no_file(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        ConfigContainer.from_toml(tmp_path / "run.toml")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be written .*choose another path"):
        ConfigContainer().to_json(tmp_path / "no" / "run.json")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e9", 1e9), ("1.", 1.0), ("+.5", 0.5), ("-3", -3), ("0x1f", 31),
        ("0o17", 15), ("010", 10), ("1_000", "1_000"), ("1:30", "1:30"), ("yes", "yes"),
        ("on", "on"), ("2024-01-01", "2024-01-01"), ("True", True), ("~", None), ("", None),
        ("e5", "e5"), (".", "."), ("'1'", "1"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    got = yaml_text.loads(text)
    assert got == value
    assert type(got) is type(value)
