# SPDX-License-Identifier: Apache-2.0
"""SentencePiece, tiktoken and transformers: ids as the libraries give them, errors in one line."""

from __future__ import annotations

import base64
import io
import pickle
import sys

import pytest
from chat_styles import TEXT, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from mb_config import TokenizerConfig
from mb_engine.data import DataError, build_tokenizer
from mb_engine.data.tokenizer_libraries import byte_offsets
from mb_engine.data.tokenizers import ByteTokenizer, fingerprint


def build(kind, model, **settings):
    config = TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(model), **settings)
    return build_tokenizer(config)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece unigram model with byte fallback, trained on the spot."""
    library = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    with path.open("wb") as file:
        library.SentencePieceTrainer.train(
            sentence_iterator=io.BytesIO(TEXT.encode()),
            model_writer=file,
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


@pytest.fixture
def ranks(tmp_path):
    """A tiktoken file: all bytes and a few merges."""
    pytest.importorskip("tiktoken")
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" c", b" ca", b" cat"]
    lines = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens)]
    path = tmp_path / "small.tiktoken"
    path.write_text("\n".join(lines))
    return path


class TestSentencePiece:
    def test_ids_are_those_of_the_library_and_text_comes_back(self, pieces):
        import sentencepiece

        oracle = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
        for path in (pieces, pieces.parent):
            tokenizer = build("sentencepiece", path)
            assert tokenizer.encode("the cat é") == oracle.encode("the cat é")
            assert tokenizer.decode(tokenizer.encode("the cat é")) == "the cat é"
            assert tokenizer.vocab_size == oracle.vocab_size()
            assert tokenizer.eod == oracle.eos_id()
        assert tokenizer.encode_batch(["a", "cat"]) == [oracle.encode("a"), oracle.encode("cat")]

    def test_marks_in_chat_text_become_special_ids_with_their_places(self, pieces):
        tokenizer = build("sentencepiece", pieces)
        text = "<s>the cat</s>"
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids[0] == 1
        assert ids[-1] == tokenizer.eod
        assert offsets[-1] == (10, 14)
        assert [end for _, end in offsets][-2] == 10
        _, offsets = tokenizer.encode_with_offsets("é cat")
        assert sorted({start for start, _ in offsets}) == [0, 1, 2, 3, 4], "in characters"

    def test_it_travels_to_other_processes(self, pieces):
        tokenizer = build("sentencepiece", pieces)
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.encode("the mat") == tokenizer.encode("the mat")

    def test_other_files_are_refused(self, tmp_path):
        pytest.importorskip("sentencepiece")
        with pytest.raises(DataError, match=r"tokenizer.model does not exist"):
            build("sentencepiece", tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(b"no model")
        with pytest.raises(DataError, match=r"is not a SentencePiece model"):
            build("sentencepiece", tmp_path)


class TestTiktoken:
    def test_ids_follow_the_ranks(self, ranks):
        tokenizer = build("tiktoken", ranks, special_tokens=["<|end|>", "<|pad|>"])
        assert tokenizer.encode("the cat") == [257, 260]
        assert tokenizer.encode("é") == [0xC3, 0xA9]
        assert tokenizer.eod == 261
        assert tokenizer.vocab_size == 263
        assert tokenizer.decode([257, 260, 261]) == "the cat"

    def test_special_tokens_are_read_in_chat_text_alone(self, ranks):
        tokenizer = build("tiktoken", ranks)
        assert tokenizer.eod not in tokenizer.encode("<|endoftext|>")
        ids, offsets = tokenizer.encode_with_offsets("é the<|endoftext|>")
        assert ids[-1] == tokenizer.eod
        assert offsets[:2] == [(0, 1), (0, 1)], "both bytes are of one character"
        assert offsets[-1] == (5, 18)

    def test_another_pattern_cuts_otherwise(self, ranks):
        tokenizer = build("tiktoken", ranks, tiktoken_pattern=r"[\s\S]")
        assert tokenizer.encode("the") == list(b"the")

    def test_it_travels_to_other_processes(self, ranks):
        tokenizer = build("tiktoken", ranks)
        assert pickle.loads(pickle.dumps(tokenizer)).encode("the cat") == [257, 260]

    def test_what_cannot_be_read_is_refused(self, ranks, tmp_path):
        with pytest.raises(DataError, match=r"neither a file nor an encoding.*cl100k_base"):
            build("tiktoken", tmp_path / "absent")
        with pytest.raises(DataError, match=r"special_tokens=\[\].*name one"):
            build("tiktoken", ranks, special_tokens=[])
        ranks.write_text("YQ== 0\nYQ== zero\n")
        with pytest.raises(DataError, match=r"line 2 is not a token in base64"):
            build("tiktoken", ranks)


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_a_missing_library_names_what_to_install(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(DataError, match=rf'needs the {kind} library; pip install "mb-engine\[data'):
        build(kind, tmp_path)


class TestTransformersFolders:
    def test_a_folder_without_tokenizer_json_is_read_by_transformers(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n##s")
        slow = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), eos_token="[SEP]")
        slow.save_pretrained(tmp_path)
        assert not (tmp_path / "tokenizer.json").exists()
        tokenizer = build("huggingface", tmp_path)
        assert tokenizer.encode("the cats") == [5, 6, 7]
        assert tokenizer.eod == 3
        assert tokenizer.vocab_size == 8
        assert tokenizer.encode_with_offsets("the cats")[1] == [(0, 3), (4, 7), (7, 8)]
        assert tokenizer.decode([5, 6, 7, 3]) == "the cats"

    def test_a_folder_that_it_cannot_read_is_named(self, tmp_path):
        pytest.importorskip("transformers")
        (tmp_path / "tokenizer_config.json").write_text("{}")
        with pytest.raises(DataError, match=r"transformers cannot read it"):
            build("huggingface", tmp_path)


class TestOffsets:
    @given(st.text(min_size=1))
    def test_bytes_of_a_character_share_its_place(self, text):
        ids, offsets = ByteTokenizer().encode_with_offsets(text)
        for number, (start, end) in zip(ids, offsets, strict=True):
            assert end == start + 1
            assert number in text[start].encode()

    def test_a_token_covers_all_characters_it_touches(self):
        assert byte_offsets("aéb", [2, 2]) == [(0, 2), (1, 3)]

    def test_those_of_huggingface_are_of_characters(self, tmp_path):
        tokenizer = build("huggingface", save_tokenizer(tmp_path))
        text = "<|im_start|>the café"
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert offsets[0] == (0, 12)
        assert offsets[-1][1] == len(text)


class TestFingerprints:
    def test_they_tell_tokenizers_apart(self, tmp_path, pieces, ranks):
        found = {
            fingerprint(build("huggingface", save_tokenizer(tmp_path / "a"))),
            fingerprint(build("huggingface", save_tokenizer(tmp_path / "b", "gemma"))),
            fingerprint(build("sentencepiece", pieces)),
            fingerprint(build("tiktoken", ranks)),
            fingerprint(build("tiktoken", ranks, special_tokens=["<|end|>"])),
            fingerprint(ByteTokenizer()),
        }
        assert len(found) == 6

    def test_one_of_ones_own_is_known_by_what_it_does(self):
        class Own:
            vocab_size, eod = 300, 299

            def __init__(self, shift):
                self.shift = shift

            def encode(self, text):
                return [b + self.shift for b in text.encode()]

        assert fingerprint(Own(1)) == fingerprint(Own(1))
        assert fingerprint(Own(1)) != fingerprint(Own(2))
