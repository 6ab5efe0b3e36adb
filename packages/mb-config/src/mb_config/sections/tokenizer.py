# SPDX-License-Identifier: Apache-2.0
"""Which tokenizer."""

from __future__ import annotations

from typing import Literal

from attrs import define, field

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class TokenizerConfig:
    """The tokenizer.

    Attributes:
        tokenizer_type: bytes needs no files; huggingface, sentencepiece and tiktoken read
            tokenizer_model; null takes token ids written as numbers.
        tokenizer_model: Folder or file of the tokenizer; for tiktoken also the name of an encoding.
        vocab_size: Tokens of a null tokenizer.
        chat_template: File with a Jinja template for chats; null means the tokenizer's own.
        tiktoken_pattern: Regular expression that cuts text before tiktoken merges bytes; null means
            that of cl100k_base.
        special_tokens: Of a tiktoken file: what follows its merges; the first ends a document.
    """

    tokenizer_type: Literal["bytes", "huggingface", "sentencepiece", "tiktoken", "null"] = "bytes"
    tokenizer_model: str | None = None
    vocab_size: int | None = number(None, ge=1)
    chat_template: str | None = None
    tiktoken_pattern: str | None = None
    special_tokens: list[str] = field(factory=lambda: ["<|endoftext|>"])

    __attrs_post_init__ = check_all
    __repr__ = concise
