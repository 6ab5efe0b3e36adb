# SPDX-License-Identifier: Apache-2.0
"""Text files as tokens and windows; mock data; errors that name the file."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mb_config import ConfigContainer, MockDatasetConfig, TextDatasetConfig
from mb_config.errors import UserError
from mb_engine.data import DataError, Datasets, MockDataset, TokenWindows, build_datasets, text
from mb_engine.data.datasets import parse_split
from mb_engine.data.text import load_tokens, split_tokens
from mb_engine.data.tokenizers import ByteTokenizer, NullTokenizer

BYTES = ByteTokenizer()


def config(seq_length: int = 8, **dataset) -> ConfigContainer:
    made = ConfigContainer(dataset=TextDatasetConfig(**dataset))
    made.model.seq_length = seq_length
    return made


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert isinstance(error.value, UserError)
    assert "\n" not in message
    return message


class TestFiles:
    def test_documents_follow_each_other_with_an_end_each(self, tmp_path):
        (tmp_path / "b.txt").write_text("two")
        (tmp_path / "a.txt").write_text("öne", encoding="utf-8")
        tokens = load_tokens([str(tmp_path / "*.txt")], BYTES, setting="dataset.path")
        assert tokens.tolist() == [*"öne".encode(), 256, *b"two", 256]
        assert tokens.dtype == np.uint16

    def test_files_are_read_in_the_order_they_are_named(self, tmp_path):
        for name in "ab":
            (tmp_path / name).write_text(name)
        paths = [str(tmp_path / "b"), str(tmp_path / "a")]
        tokens = load_tokens(paths, BYTES, setting="dataset.path")
        assert tokens.tolist() == [ord("b"), 256, ord("a"), 256]

    def test_a_pattern_may_cross_folders(self, tmp_path):
        (tmp_path / "deep" / "er").mkdir(parents=True)
        (tmp_path / "deep" / "er" / "x.txt").write_text("x")
        tokens = load_tokens([str(tmp_path / "**" / "*.txt")], BYTES, setting="dataset.path")
        assert tokens.tolist() == [ord("x"), 256]

    def test_a_file_whose_name_looks_like_a_pattern_is_read(self, tmp_path):
        (tmp_path / "x[1].txt").write_text("x")
        tokens = load_tokens([str(tmp_path / "x[1].txt")], BYTES, setting="dataset.path")
        assert tokens.tolist() == [ord("x"), 256]

    def test_a_large_vocabulary_takes_32_bits(self, tmp_path):
        (tmp_path / "n").write_text("70000 1")
        tokenizer = NullTokenizer(vocab_size=70_001)
        tokens = load_tokens([str(tmp_path / "n")], tokenizer, setting="dataset.path")
        assert tokens.dtype == np.uint32
        assert tokens.tolist() == [70_000, 1, 70_000]

    def test_the_python_documentation_is_real_text(self):
        tokens = load_tokens(["pydoc:topics"], BYTES, setting="dataset.path")
        content = BYTES.decode(tokens[:-1])
        from pydoc_data.topics import topics

        assert len(tokens) > 300_000
        assert all(topic in content for topic in topics.values())

    @pytest.mark.parametrize("size", [1, 5, 7, 100])
    def test_reading_in_pieces_loses_nothing(self, tmp_path, monkeypatch, size):
        content = "one\ntwo two\n\nthree\n" + "x" * 40 + "\nend"
        (tmp_path / "t").write_text(content)
        monkeypatch.setattr(text, "_PIECE", size)
        tokens = load_tokens([str(tmp_path / "t")], BYTES, setting="dataset.path")
        assert BYTES.decode(tokens[:-1]) == content


class TestBadFiles:
    def check(self, *words: str, paths: list[str]) -> None:
        with pytest.raises(DataError) as error:
            build_datasets(config(path=paths), BYTES)
        message = one_line(error)
        assert all(word in message for word in ("dataset.path", *words)), message

    def test_no_path(self):
        self.check("names no files", "pydoc:topics", paths=[])

    def test_a_missing_file(self, tmp_path):
        missing = str(tmp_path / "no.txt")
        self.check(missing, "does not exist", "correct the path", paths=[missing])

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "empty.txt").touch()
        path = str(tmp_path / "empty.txt")
        self.check(path, "is empty", "name a file with text", paths=[path])

    def test_a_pattern_that_matches_nothing(self, tmp_path):
        pattern = str(tmp_path / "*.txt")
        self.check(pattern, "no file matches", paths=[pattern])

    def test_a_folder(self, tmp_path):
        self.check(str(tmp_path), "cannot be read", "text file", paths=[str(tmp_path)])

    def test_a_file_that_is_not_text(self, tmp_path):
        (tmp_path / "x.bin").write_bytes(b"ab\xff\xfe")
        self.check("x.bin", "not UTF-8 at byte 2", paths=[str(tmp_path / "x.bin")])

    def test_too_little_text(self, tmp_path):
        (tmp_path / "s.txt").write_text("short")
        with pytest.raises(DataError) as error:
            build_datasets(config(path=[str(tmp_path / "s.txt")]), BYTES)
        message = one_line(error)
        assert "train part of dataset.path (dataset.split=90,10,0) has 5 tokens" in message
        assert "dataset.seq_length + 1 = 9" in message

    def test_a_validation_file(self, tmp_path):
        (tmp_path / "long.txt").write_text("x" * 200)
        (tmp_path / "s.txt").write_text("short")
        path = str(tmp_path / "s.txt")
        made = config(path=[str(tmp_path / "long.txt")], validation_paths={"extra": path})
        with pytest.raises(DataError, match=f"dataset.validation_paths.extra={path} has 6 tokens"):
            build_datasets(made, BYTES)


class TestSplit:
    def test_parts_follow_each_other_without_overlap(self):
        parts = split_tokens(np.arange(103), (90.0, 8.0, 2.0))
        assert [len(p) for p in parts] == [93, 8, 2]
        assert np.concatenate(parts).tolist() == list(range(103))

    @given(st.integers(0, 5000), st.lists(st.floats(0.1, 100), min_size=1, max_size=3))
    def test_nothing_is_lost(self, size, shares):
        parts = split_tokens(np.arange(size), shares)
        assert np.concatenate(parts).tolist() == list(range(size))
        for part, share in zip(parts, shares, strict=True):
            assert abs(len(part) - size * share / sum(shares)) <= 1

    def test_shares_left_out_are_zero(self):
        assert parse_split("100") == (100.0, 0.0, 0.0)
        assert parse_split("9, 1") == (9.0, 1.0, 0.0)

    @pytest.mark.parametrize("split", ["", "0,100,0", "a,b", "90,-1,0", "1,2,3,4", "nan", "inf"])
    def test_anything_else_is_refused(self, split):
        with pytest.raises(DataError, match=r"dataset.split=.*write it like 90,10,0"):
            parse_split(split)


class TestWindows:
    def test_labels_are_the_tokens_that_follow(self):
        sample = TokenWindows(tokens=np.arange(20, dtype=np.uint16), seq_length=4)[2]
        assert sample["tokens"].tolist() == [8, 9, 10, 11]
        assert sample["labels"].tolist() == [9, 10, 11, 12]
        assert sample["position_ids"].tolist() == [0, 1, 2, 3]
        assert sample["loss_mask"].tolist() == [1.0] * 4
        assert {k: str(v.dtype) for k, v in sample.items()} == {
            "tokens": "int64",
            "labels": "int64",
            "position_ids": "int64",
            "loss_mask": "float32",
        }

    @given(st.integers(2, 300), st.integers(1, 20))
    def test_every_token_is_predicted_once_up_to_a_remainder(self, size, length):
        if size < length + 1:
            return
        windows = TokenWindows(tokens=np.arange(size), seq_length=length)
        labels = np.concatenate([windows[i]["labels"] for i in range(len(windows))])
        assert labels.tolist() == list(range(1, len(windows) * length + 1))
        assert size - 1 - len(labels) < length

    @given(st.integers(10, 300), st.integers(1, 9), st.integers(0, 50))
    def test_a_shifted_epoch_stays_within_the_text_and_is_as_long(self, size, length, epoch):
        windows = TokenWindows(tokens=np.arange(size), seq_length=length, random_offset=True)
        index = np.arange(len(windows))
        got = windows.get_batch(index, np.full_like(index, epoch))["tokens"].reshape(-1)
        assert got.tolist() == list(range(got[0], got[0] + len(windows) * length))
        assert got[0] == windows.offset(epoch) < length

    def test_shifts_differ_by_epoch_and_begin_with_none(self):
        windows = TokenWindows(tokens=np.arange(1001), seq_length=50, random_offset=True, seed=1)
        offsets = [windows.offset(e) for e in range(400)]
        assert offsets[0] == 0
        assert set(offsets) == set(range(50))
        assert offsets != [
            TokenWindows(tokens=np.arange(1001), seq_length=50, random_offset=True, seed=2).offset(
                e
            )
            for e in range(400)
        ]

    def test_a_batch_may_mix_epochs(self):
        windows = TokenWindows(tokens=np.arange(500), seq_length=50, random_offset=True, seed=1)
        got = windows.get_batch(np.array([1, 1, 2]), np.array([3, 0, 3]))["tokens"][:, 0]
        assert got.tolist() == [50 + windows.offset(3), 50, 100 + windows.offset(3)]

    def test_an_index_beyond_the_end_is_an_error(self):
        windows = TokenWindows(tokens=np.arange(20), seq_length=4)
        assert windows[-1]["tokens"][0] == 12
        with pytest.raises(IndexError, match="sample 4 of 4"):
            windows[4]

    def test_a_file_on_disk_can_stand_for_the_tokens(self, tmp_path):
        np.save(tmp_path / "t.npy", np.arange(100, dtype=np.uint16))
        mapped = np.load(tmp_path / "t.npy", mmap_mode="r")
        assert TokenWindows(tokens=mapped, seq_length=4)[3]["tokens"].tolist() == [12, 13, 14, 15]


class TestMock:
    def test_counting_sequences_follow_from_two_tokens(self):
        dataset = MockDataset(num_samples=200, seq_length=16, vocab_size=11)
        got = dataset.get_batch(np.arange(200), np.zeros(200, dtype=np.int64))
        step = (got["tokens"][:, 1] - got["tokens"][:, 0]) % 11
        expected = (got["tokens"][:, :1] + step[:, None] * np.arange(1, 17)) % 11
        np.testing.assert_array_equal(got["labels"], expected)
        assert set(step.tolist()) == {1, 2, 3, 4}
        assert set(got["tokens"][:, 0].tolist()) == set(range(11))

    def test_random_tokens_are_uniform(self):
        dataset = MockDataset(num_samples=500, seq_length=64, vocab_size=16, pattern="random")
        got = dataset.get_batch(np.arange(500), np.zeros(500, dtype=np.int64))
        counts = np.bincount(got["tokens"].reshape(-1), minlength=16)
        expected = 500 * 64 / 16
        assert ((counts - expected) ** 2 / expected).sum() < 15 + 5 * np.sqrt(30)
        np.testing.assert_array_equal(got["labels"][:, :-1], got["tokens"][:, 1:])

    def test_seed_and_index_decide(self):
        make = lambda seed: MockDataset(num_samples=9, seq_length=4, vocab_size=99, seed=seed)
        assert make(1)[3]["tokens"].tolist() == make(1)[3]["tokens"].tolist()
        assert make(1)[3]["tokens"].tolist() != make(2)[3]["tokens"].tolist()
        assert make(1)[3]["tokens"].tolist() != make(1)[4]["tokens"].tolist()


class TestBuild:
    def test_text_becomes_train_validation_and_test(self, tmp_path):
        (tmp_path / "t.txt").write_text("0123456789" * 30)
        (tmp_path / "v.txt").write_text("abcdefghij" * 3)
        made = config(
            path=[str(tmp_path / "t.txt")],
            split="80,10,10",
            validation_paths={"letters": str(tmp_path / "v.txt")},
            random_offset=True,
        )
        built = build_datasets(made, BYTES)
        assert list(built.valid) == ["validation", "letters"]
        assert [len(built.train.tokens), len(built.valid["validation"].tokens)] == [241, 30]
        assert len(built.test.tokens) == 30
        assert built.train.random_offset
        assert not built.valid["validation"].random_offset
        assert BYTES.decode(built.valid["letters"][0]["tokens"]) == "abcdefgh"

    def test_a_dataset_may_have_a_sequence_length_of_its_own(self, tmp_path):
        (tmp_path / "t.txt").write_text("0123456789" * 30)
        made = config(path=[str(tmp_path / "t.txt")], seq_length=5)
        assert build_datasets(made, BYTES).train[0]["tokens"].shape == (5,)

    def test_without_a_share_there_is_no_validation(self, tmp_path):
        (tmp_path / "t.txt").write_text("0123456789" * 30)
        built = build_datasets(config(path=[str(tmp_path / "t.txt")], split="100,0,0"), BYTES)
        assert built.valid == {}
        assert built.test is None

    def test_a_name_taken_by_the_split_is_refused(self, tmp_path):
        (tmp_path / "t.txt").write_text("0123456789" * 30)
        path = str(tmp_path / "t.txt")
        made = config(path=[path], validation_paths={"validation": path})
        with pytest.raises(DataError, match=r"validation_paths.validation: .*choose another"):
            build_datasets(made, BYTES)

    def test_mock_data_takes_vocabulary_and_seed_from_the_run(self):
        made = ConfigContainer(
            dataset=MockDatasetConfig(num_samples=7, num_validation_samples=3, pattern="random")
        )
        made.model.seq_length = 6
        built = build_datasets(made, NullTokenizer(vocab_size=50))
        assert (len(built.train), len(built.valid["validation"])) == (7, 3)
        assert built.train[0]["tokens"].shape == (6,)
        assert built.train[0]["tokens"].tolist() != built.valid["validation"][0]["tokens"].tolist()
        made.rng.seed = 99
        again = build_datasets(made, NullTokenizer(vocab_size=50))
        assert built.train[0]["tokens"].tolist() != again.train[0]["tokens"].tolist()

    def test_a_class_of_ones_own_builds_itself(self, tmp_path):
        source = tmp_path / "own.py"
        source.write_text(
            "from attrs import define\n"
            "@define(kw_only=True)\n"
            "class OwnConfig:\n"
            "    items: int = 3\n"
            "    def build_datasets(self, config, tokenizer):\n"
            "        return list(range(self.items))\n"
        )
        spec = importlib.util.spec_from_file_location("own", source)
        module = sys.modules["own"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        built = build_datasets(ConfigContainer(dataset=module.OwnConfig(items=4)), BYTES)
        assert built == Datasets(train=[0, 1, 2, 3])

    def test_a_class_that_cannot_build_is_refused(self):
        from attrs import define

        @define
        class Bare:
            pass

        with pytest.raises(DataError, match="dataset=Bare does not say how to build it"):
            build_datasets(ConfigContainer(dataset=Bare()), BYTES)
