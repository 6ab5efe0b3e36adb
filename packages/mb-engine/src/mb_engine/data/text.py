# SPDX-License-Identifier: Apache-2.0
"""Text files as one row of tokens."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mb_engine.data import locations
from mb_engine.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mb_engine.data.tokenizers import Tokenizer

PYDOC_TOPICS = "pydoc:topics"
_PIECE = 1 << 22  # characters tokenised at once: bounds the memory that Python lists of ids take


def load_tokens(paths: Sequence[str], tokenizer: Tokenizer, *, setting: str) -> NDArray[Any]:
    """Return the tokens of all *paths*, each document followed by the end-of-document token.

    Args:
        paths: Text files in UTF-8 here or in object stores, patterns as the shell has them, and ``"pydoc:topics"``, the
            Python documentation that every CPython carries. Matches are read in sorted order.
        tokenizer: Text of more than 4 Mi characters is given to it in pieces that end with a line.
        setting: The configuration field that names the paths, for messages.

    Returns:
        1-D uint16, or uint32 where the vocabulary needs it.

    Raises:
        DataError: If a file is missing, empty or not UTF-8, or a pattern matches nothing.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    rows: list[NDArray[Any]] = []
    for source in expand(paths, setting=setting):
        rows += [
            np.array(tokenizer.encode(t), dtype=dtype) for t in text_pieces(_text(source, setting))
        ]
        rows.append(np.array([tokenizer.eod], dtype=dtype))
    return np.concatenate(rows)


def expand(paths: Sequence[str], *, setting: str) -> list[str]:
    """Return *paths* with patterns replaced by the files they match.

    Raises:
        DataError: If there are none, or a pattern matches nothing.
    """
    if not paths:
        raise DataError(f"{setting} names no files; name text files, or {PYDOC_TOPICS}")
    found: list[str] = []
    for path in paths:
        plain = path == PYDOC_TOPICS or locations.is_remote(path)
        pattern = path if plain else str(Path(path).expanduser())
        try:
            matches = None if path == PYDOC_TOPICS else locations.matches(pattern)
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise DataError(f"{setting}: {path!r} cannot be listed ({reason})") from error
        if matches == []:
            raise DataError(f"{setting}: no file matches {path!r}; correct the pattern")
        found += [pattern] if matches is None else matches
    return found


def _text(source: str, setting: str) -> str:
    if source == PYDOC_TOPICS:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        with locations.open_bytes(source) as file:
            text = file.read().decode()
    except FileNotFoundError as error:
        raise DataError(
            f"{setting}: {source} does not exist; correct the path (it is relative to the working"
            " directory)"
        ) from error
    except OSError as error:
        raise DataError(
            f"{setting}: {source} cannot be read ({error.strerror or error}); name a readable text file"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{setting}: {source} is not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from error
    if not text:
        raise DataError(f"{setting}: {source} is empty; name a file with text")
    return text


def text_pieces(text: str) -> Iterator[str]:
    """Yield *text* in pieces of about 4 Mi characters that end with a line."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
            end = end if end > start else start + _PIECE
        yield text[start:end]
        start = end


def split_tokens(tokens: NDArray[Any], shares: Sequence[float]) -> list[NDArray[Any]]:
    """Return consecutive parts of *tokens* whose lengths are as *shares*, without copying.

    Args:
        tokens: 1-D.
        shares: Not negative, not all zero; they need not add up to 100.
    """
    ends = np.rint(np.cumsum([0.0, *shares]) / sum(shares) * len(tokens)).astype(np.int64)
    return [tokens[a:b] for a, b in pairwise(ends)]
