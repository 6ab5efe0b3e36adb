# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: round trips, and one-line errors where something is missing."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mb_config import TokenizerConfig
from mb_engine.data import DataError, build_tokenizer
from mb_engine.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, NullTokenizer


class TestBytes:
    @given(st.text())
    def test_any_text_comes_back(self, text):
        assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text

    def test_ids_are_utf8_and_the_end_is_outside_them(self):
        tokenizer = build_tokenizer(TokenizerConfig())
        assert tokenizer.encode("é") == [0xC3, 0xA9]
        assert tokenizer.eod == 256
        assert tokenizer.vocab_size == 257

    def test_broken_bytes_and_padding_do_not_stop_decoding(self):
        assert ByteTokenizer().decode([104, 0xC3, 105, 256, 300]) == "h\ufffdi"


class TestNull:
    def test_numbers_come_back(self):
        tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="null", vocab_size=100))
        assert tokenizer.encode("5 99\n0") == [5, 99, 0]
        assert tokenizer.decode([5, 99, 0]) == "5 99 0"
        assert tokenizer.eod == 99

    @pytest.mark.parametrize("text", ["100", "x", "-1", "1.5", "²"])
    def test_anything_else_is_refused(self, text):
        with pytest.raises(DataError, match=r"not an id below tokenizer.vocab_size=100"):
            NullTokenizer(vocab_size=100).encode(f"1 {text}")

    def test_a_size_is_needed(self):
        with pytest.raises(DataError, match=r"tokenizer.vocab_size is not set"):
            build_tokenizer(TokenizerConfig(tokenizer_type="null"))


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE with an end token, saved as Hugging Face libraries save it."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<start>", "<|endoftext|>", "<stop>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat and the other cat"] * 3, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


class TestHuggingFace:
    def build(self, path) -> HuggingFaceTokenizer:
        config = TokenizerConfig(tokenizer_type="huggingface", tokenizer_model=str(path))
        return build_tokenizer(config)

    @pytest.mark.parametrize("name", ["", "tokenizer.json"])
    def test_text_comes_back_from_a_file_or_its_folder(self, folder, name):
        tokenizer = self.build(folder / name)
        ids = tokenizer.encode("the café cat")
        assert tokenizer.decode(ids) == "the café cat"
        assert len(ids) < len("the café cat".encode())
        assert max(ids) < tokenizer.vocab_size

    def test_no_special_tokens_are_added(self, folder):
        assert 0 not in self.build(folder).encode("the cat")

    def test_ids_equal_those_of_the_library(self, folder):
        import tokenizers

        oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = self.build(folder)
        assert tokenizer.encode("a cat") == oracle.encode("a cat", add_special_tokens=False).ids
        assert tokenizer.vocab_size == oracle.get_vocab_size()

    def test_the_end_is_a_well_known_token_or_the_one_the_configuration_names(self, folder):
        assert self.build(folder).eod == 1
        for eos in ("<stop>", {"content": "<stop>", "lstrip": False}):
            (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
            assert self.build(folder).eod == 2

    def test_a_vocabulary_without_an_end_is_refused(self, folder):
        content = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"no end-of-document token; put tokenizer_config.json"):
            self.build(folder)

    def test_a_missing_file_is_named(self, tmp_path):
        pytest.importorskip("tokenizers")
        with pytest.raises(DataError, match=r"tokenizer_model=.*tokenizer.json does not exist"):
            self.build(tmp_path)

    def test_a_file_of_another_kind_is_named(self, tmp_path):
        pytest.importorskip("tokenizers")
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer") as error:
            self.build(tmp_path)
        assert "\n" not in str(error.value)

    def test_a_missing_library_names_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(DataError, match=r'pip install "mb-engine\[hf\]"'):
            self.build(tmp_path)

    def test_a_path_is_needed(self):
        with pytest.raises(DataError, match=r"tokenizer.tokenizer_model is not set"):
            build_tokenizer(TokenizerConfig(tokenizer_type="huggingface"))
