# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen
from attrs.validators import ge

from mb_engine.data.errors import DataError
from mb_engine.data.tokenizer_libraries import (
    Offsets,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    TransformersTokenizer,
    byte_offsets,
    file_digest,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mb_config import TokenizerConfig

# the first of these that a vocabulary has ends its documents
_EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "[SEP]",
)


_NEEDS = {
    "huggingface": "a tokenizer.json, or a local folder that has one",
    "sentencepiece": "a .model file, or a local folder with a tokenizer.model",
    "tiktoken": "a file of merges, or the name of an encoding",
}
_PROBES = ("", "0 1 2", "The quick brown fox, 12345 times.", "\n\t  é ß 漢字 \U0001f600")


class Tokenizer(Protocol):
    """What the data sets and text generation ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eod(self) -> int:
        """The id that ends a document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, without special tokens around them."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of *ids*."""
        ...


@frozen
class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for the end of a document."""

    @property
    def vocab_size(self) -> int:
        """257."""
        return 257

    @property
    def eod(self) -> int:
        """256."""
        return 256

    @property
    def fingerprint(self) -> str:
        """The same for all."""
        return "bytes"

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of *text*."""
        return list(text.encode())

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Return the bytes of *text*, and which character each is of."""
        ids = self.encode(text)
        return ids, byte_offsets(text, [1] * len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of *ids*; bytes that are not UTF-8 show as U+FFFD, ids above are left out."""
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")


@frozen(kw_only=True)
class NullTokenizer:
    """Ids written as decimal numbers; for data that is tokenised already, and for benchmarks.

    Attributes:
        vocab_size: Ids are below it; the last one ends a document.
    """

    vocab_size: int = field(validator=ge(1))

    @property
    def eod(self) -> int:
        """The last id."""
        return self.vocab_size - 1

    @property
    def fingerprint(self) -> str:
        """The size of the vocabulary."""
        return f"null-{self.vocab_size}"

    def encode(self, text: str) -> list[int]:
        """Return the numbers in *text*, which are separated by white space.

        Raises:
            DataError: If a word is not a number below ``vocab_size``.
        """
        ids = [int(word) if word.isdecimal() else -1 for word in text.split()]
        for word, number in zip(text.split(), ids, strict=True):
            if not 0 <= number < self.vocab_size:
                raise DataError(
                    f"{word!r} is not an id below tokenizer.vocab_size={self.vocab_size}; the null"
                    " tokenizer reads numbers, use tokenizer.tokenizer_type=bytes for text"
                )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return *ids* as numbers separated by spaces."""
        return " ".join(str(int(i)) for i in ids)


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library, read from local files.

    Attributes:
        path: The file it was read from.
    """

    def __init__(self, model: str | Path) -> None:
        """Read ``tokenizer.json`` from the file or folder *model*.

        Raises:
            DataError: If the library or the file is missing, the file cannot be read, or the
                vocabulary has no end-of-document token.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                "tokenizer.tokenizer_type=huggingface needs the tokenizers library;"
                ' pip install "mb-engine[hf]"'
            ) from error
        path = Path(model).expanduser()
        self.path = path / "tokenizer.json" if path.is_dir() else path
        if not self.path.is_file():
            raise DataError(
                f"tokenizer.tokenizer_model={model}: {self.path} does not exist; name a"
                " tokenizer.json, or a local folder that has one"
            )
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            reason = str(error).splitlines()[0]
            raise DataError(
                f"tokenizer.tokenizer_model={model}: {self.path} is not a tokenizer of the"
                f" tokenizers library ({reason}); save it anew with save_pretrained"
            ) from error
        self._size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self._eod = self._find_eod()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._size

    @property
    def eod(self) -> int:
        """The id of the token that ends a document."""
        return self._eod

    @property
    def fingerprint(self) -> str:
        """A hash of ``tokenizer.json`` and of what lies beside it for it."""
        return "huggingface-" + file_digest(self.path, self.path.with_name("tokenizer_config.json"))

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, without special tokens around them."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of *texts*."""
        made = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [row.ids for row in made]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Return the ids of *text*, and which characters each stands for."""
        made = self._tokenizer.encode(text, add_special_tokens=False)
        return made.ids, made.offsets

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of *ids* without special tokens."""
        text: str = self._tokenizer.decode([int(i) for i in ids])
        return text

    def _find_eod(self) -> int:
        """Return the end token that tokenizer_config.json names, or else a well-known one."""
        names = [*self._configured_eos(), *_EOD_NAMES]
        for name in names:
            found: int | None = self._tokenizer.token_to_id(name)
            if found is not None:
                return found
        raise DataError(
            f"tokenizer.tokenizer_model: {self.path} has no end-of-document token; put"
            " tokenizer_config.json with its eos_token beside it"
        )

    def _configured_eos(self) -> list[str]:
        import json

        config = self.path.with_name("tokenizer_config.json")
        if not config.is_file():
            return []
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        return [token] if isinstance(token, str) else []


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer that *config* describes.

    Raises:
        DataError: If something it needs is missing.
    """
    kind = config.tokenizer_type
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "null":
        if config.vocab_size is None:
            raise DataError(
                "tokenizer.vocab_size is not set; tokenizer_type=null needs the number of ids"
            )
        return NullTokenizer(vocab_size=config.vocab_size)
    if config.tokenizer_model is None:
        raise DataError(
            f"tokenizer.tokenizer_model is not set; tokenizer_type={kind} needs {_NEEDS[kind]}"
        )
    if kind == "sentencepiece":
        return SentencePieceTokenizer(config.tokenizer_model)
    if kind == "tiktoken":
        return TiktokenTokenizer(
            config.tokenizer_model,
            pattern=config.tiktoken_pattern,
            special_tokens=config.special_tokens,
        )
    folder = Path(config.tokenizer_model).expanduser()
    if (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        return TransformersTokenizer(folder)
    return HuggingFaceTokenizer(config.tokenizer_model)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return what tells *tokenizer* from others, for the names of prepared data.

    Its ``fingerprint`` where it has one, otherwise a hash of what it makes of some texts.
    """
    own = getattr(tokenizer, "fingerprint", None)
    if own is not None:
        return str(own)
    seen = [tokenizer.vocab_size, tokenizer.eod]
    for text in _PROBES:
        seen += tokenizer.encode(text)
    digest = hashlib.sha256(repr(seen).encode()).hexdigest()
    return f"{type(tokenizer).__name__}-{digest}"
