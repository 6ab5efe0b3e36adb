# SPDX-License-Identifier: Apache-2.0
"""Which tokenizer."""

from __future__ import annotations

from typing import Literal

from attrs import define

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class TokenizerConfig:
    """The tokenizer.

    Attributes:
        tokenizer_type: bytes needs no files; huggingface reads tokenizer_model; null takes token
            ids written as numbers.
        tokenizer_model: Folder or tokenizer.json of a huggingface tokenizer.
        vocab_size: Tokens of a null tokenizer.
    """

    tokenizer_type: Literal["bytes", "huggingface", "null"] = "bytes"
    tokenizer_model: str | None = None
    vocab_size: int | None = number(None, ge=1)

    __attrs_post_init__ = check_all
    __repr__ = concise
