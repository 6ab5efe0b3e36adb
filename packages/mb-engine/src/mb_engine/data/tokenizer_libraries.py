# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of SentencePiece, tiktoken and transformers; each library is imported when asked for."""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mb_engine.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Offsets = list[tuple[int, int]]

# How text is cut before bytes are merged. Source: the "cl100k_base" encoding of tiktoken.
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def require(library: str, *, setting: str, extra: str = "data") -> Any:
    """Return the module *library*.

    Raises:
        DataError: If it is not installed; names the extra that installs it.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise DataError(
            f'{setting} needs the {library} library; pip install "mb-engine[{extra}]"'
        ) from error


def file_digest(*paths: Path) -> str:
    """Return a hash of the contents of those of *paths* that are files, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class SentencePieceTokenizer:
    """A ``.model`` file of SentencePiece.

    Attributes:
        path: The file it was read from.
    """

    def __init__(self, model: str | Path) -> None:
        """Read the file *model*, or ``tokenizer.model`` in the folder *model*.

        Raises:
            DataError: If the library or the file is missing, or the file is of another kind.
        """
        library = require("sentencepiece", setting="tokenizer.tokenizer_type=sentencepiece")
        path = Path(model).expanduser()
        self.path = path / "tokenizer.model" if path.is_dir() else path
        if not self.path.is_file():
            raise DataError(
                f"tokenizer.tokenizer_model={model}: {self.path} does not exist; name a"
                " SentencePiece .model file, or a folder with a tokenizer.model"
            )
        try:
            self._model: Any = library.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"tokenizer.tokenizer_model={model}: {self.path} is not a SentencePiece model;"
                " name another file, or another tokenizer.tokenizer_type"
            ) from error
        if self._model.eos_id() < 0:
            raise DataError(
                f"tokenizer.tokenizer_model={model}: {self.path} has no end-of-sentence piece;"
                " train it with eos_id"
            )

    def __reduce__(self) -> Any:
        return type(self), (str(self.path),)

    @property
    def vocab_size(self) -> int:
        """The number of pieces."""
        return int(self._model.get_piece_size())

    @property
    def eod(self) -> int:
        """The end-of-sentence piece."""
        return int(self._model.eos_id())

    @property
    def fingerprint(self) -> str:
        """A hash of the model file."""
        return "sentencepiece-" + file_digest(self.path)

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and ``eos_token`` as chat templates name them."""
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        return {name: self._model.id_to_piece(i) for name, i in ids.items() if i >= 0}

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, without special tokens around them."""
        ids: list[int] = self._model.encode(text, out_type=int)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of *texts*."""
        rows: list[list[int]] = self._model.encode(list(texts), out_type=int, num_threads=1)
        return rows

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Return the ids of *text* and which characters each stands for.

        The beginning and the end of a sentence, written as their pieces, become their ids.
        """
        ids: list[int] = []
        offsets: Offsets = []
        names = self.special_tokens
        special = {p: self._model.piece_to_id(p) for p in names.values() if p.startswith("<")}
        for begin, piece in _split_at(text, special):
            start = begin
            if piece in special:
                ids.append(special[piece])
                offsets.append((start, start + len(piece)))
                continue
            for found in self._model.encode(piece, return_type="proto").pieces:
                ids.append(found.id)
                # Its own offsets count bytes; of a character in bytes the last one has the surface.
                offsets.append((start, start + len(found.surface)))
                start += len(found.surface)
        return ids, offsets

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of *ids*."""
        text: str = self._model.decode([int(i) for i in ids])
        return text


class TiktokenTokenizer:
    """Byte-pair merges of tiktoken, from a file of ``base64 rank`` lines or a named encoding."""

    def __init__(
        self,
        model: str | Path,
        *,
        pattern: str | None = None,
        special_tokens: Sequence[str] = ("<|endoftext|>",),
    ) -> None:
        """Read the merges.

        Args:
            model: A file, or a name that ``tiktoken.list_encoding_names`` knows (which tiktoken
                reads from its cache or downloads).
            pattern: The regular expression that cuts text first; that of cl100k_base if None.
            special_tokens: Their ids follow those of the merges; the first ends a document.

        Raises:
            DataError: If the library or the file is missing, or a line of it is wrong.
        """
        library = require("tiktoken", setting="tokenizer.tokenizer_type=tiktoken")
        self._arguments = (str(model), pattern, tuple(special_tokens))
        path = Path(model).expanduser()
        if not path.is_file():
            if str(model) not in library.list_encoding_names():
                known = ", ".join(library.list_encoding_names())
                raise DataError(
                    f"tokenizer.tokenizer_model={model} is neither a file nor an encoding that"
                    f" tiktoken names; name a file, or one of {known}"
                )
            self._encoding: Any = library.get_encoding(str(model))
            self._eod = int(self._encoding.eot_token)
        else:
            if not special_tokens:
                raise DataError(
                    "tokenizer.special_tokens=[]: the first of them ends a document; name one"
                )
            ranks = _read_ranks(path)
            first = max(ranks.values()) + 1
            self._eod = first
            self._encoding = library.Encoding(
                name=path.stem,
                pat_str=pattern or CL100K_PATTERN,
                mergeable_ranks=ranks,
                special_tokens={token: first + i for i, token in enumerate(special_tokens)},
            )

    def __reduce__(self) -> Any:
        return _make_tiktoken, self._arguments

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return int(self._encoding.n_vocab)

    @property
    def eod(self) -> int:
        """The first special token; of a named encoding its end of text."""
        return self._eod

    @property
    def fingerprint(self) -> str:
        """A hash of the file, the pattern and the special tokens."""
        model, pattern, special = self._arguments
        own = hashlib.sha256(repr((pattern, special)).encode()).hexdigest()
        return f"tiktoken-{file_digest(Path(model).expanduser()) or model}-{own}"

    @property
    def special_tokens(self) -> dict[str, str]:
        """``eos_token`` as chat templates name it."""
        return {"eos_token": self._encoding.decode([self._eod])}

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*; what looks like a special token is text."""
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of *texts*."""
        return [self._encoding.encode_ordinary(text) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Return the ids of *text*, special tokens included, and which characters they stand for."""
        ids: list[int] = self._encoding.encode(text, allowed_special="all")
        pieces = self._encoding.decode_tokens_bytes(ids)
        return ids, byte_offsets(text, [len(piece) for piece in pieces])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of *ids* without special tokens."""
        special = {self._encoding.encode_single_token(t) for t in self._encoding.special_tokens_set}
        text: str = self._encoding.decode([int(i) for i in ids if int(i) not in special])
        return text


class TransformersTokenizer:
    """A tokenizer folder of transformers that has no ``tokenizer.json``, read from local files.

    Attributes:
        path: The folder.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read *folder*; no code in it is run.

        Raises:
            DataError: If the library is missing, the folder cannot be read, or nothing in it ends
                a document.
        """
        library = require(
            "transformers", setting="tokenizer.tokenizer_type=huggingface", extra="hf"
        )
        self.path = Path(folder).expanduser()
        try:
            self._tokenizer: Any = library.AutoTokenizer.from_pretrained(
                str(self.path), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises many kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error)
            raise DataError(
                f"tokenizer.tokenizer_model={folder}: transformers cannot read it ({reason});"
                " save it anew with save_pretrained"
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                f"tokenizer.tokenizer_model={folder} has no end-of-document token; put eos_token"
                " into its tokenizer_config.json"
            )

    def __reduce__(self) -> Any:
        return type(self), (str(self.path),)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return int(max(self._tokenizer.get_vocab().values())) + 1

    @property
    def eod(self) -> int:
        """The end-of-sentence token."""
        return int(self._tokenizer.eos_token_id)

    @property
    def fingerprint(self) -> str:
        """A hash of the files of the folder."""
        return "transformers-" + file_digest(*sorted(self.path.iterdir()))

    def encode(self, text: str) -> list[int]:
        """Return the ids of *text*, without special tokens around them."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Return the ids of *text*, and which characters each stands for.

        Raises:
            DataError: If the tokenizer is one of Python alone, which keeps no offsets.
        """
        if not self._tokenizer.is_fast:
            raise DataError(
                f"tokenizer.tokenizer_model={self.path} keeps no offsets, which chat data needs;"
                " save it as a tokenizer.json with a fast tokenizer of transformers"
            )
        made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return made["input_ids"], made["offset_mapping"]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of *ids* without special tokens."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text


def byte_offsets(text: str, sizes: Sequence[int]) -> Offsets:
    """Return which characters tokens of so many UTF-8 bytes each stand for, in order.

    A character cut by tokens belongs to each of them.
    """
    where: list[int] = []  # the character of each byte
    for i, character in enumerate(text):
        where += [i] * len(character.encode())
    offsets: Offsets = []
    start = 0
    for size in sizes:
        end = start + size
        offsets.append((where[start], where[end - 1] + 1) if size else (0, 0))
        start = end
    return offsets


def _make_tiktoken(model: str, pattern: str | None, special: Sequence[str]) -> TiktokenTokenizer:
    return TiktokenTokenizer(model, pattern=pattern, special_tokens=special)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"tokenizer.tokenizer_model={path}: line {number} is not a token in base64 and its"
                " rank; name a tiktoken file"
            ) from error
    if not ranks:
        raise DataError(f"tokenizer.tokenizer_model={path} is empty; name a tiktoken file")
    return ranks


def _split_at(text: str, special: Iterable[str]) -> list[tuple[int, str]]:
    """Return the pieces of *text* between and at the *special* strings, with their starts."""
    import re

    pattern = "|".join(map(re.escape, special))
    pieces = re.split(f"({pattern})", text) if pattern else [text]
    found, start = [], 0
    for piece in pieces:
        if piece:
            found.append((start, piece))
        start += len(piece)
    return found
