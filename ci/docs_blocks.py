# SPDX-License-Identifier: Apache-2.0
"""Read the code blocks of a Markdown file."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    import pathlib

FENCE = re.compile(r"^(?P<indent> *)(?P<mark>`{3,}|~{3,}) *(?P<language>[\w+-]*)")


@frozen(kw_only=True)
class Block:
    """One fenced block.

    Attributes:
        language: The word after the fence, lower case, or empty.
        line: Line number of its first line, from 1.
        text: Its lines, without the indent of the fence.
    """

    language: str
    line: int
    text: str


def read_blocks(path: pathlib.Path) -> list[Block]:
    """Return the fenced blocks of a Markdown file, in order.

    Raises:
        ValueError: If a fence is not closed; names file and line.
    """
    blocks: list[Block] = []
    open_fence: re.Match[str] | None = None
    start, lines = 0, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fence = FENCE.match(line)
        if open_fence is None:
            if fence:
                open_fence, start, lines = fence, number + 1, []
        elif fence and line.strip().startswith(open_fence["mark"]) and not fence["language"]:
            text = textwrap.dedent("\n".join(lines)) + "\n"
            blocks.append(Block(language=open_fence["language"].lower(), line=start, text=text))
            open_fence = None
        else:
            lines.append(line)
    if open_fence is not None:
        raise ValueError(f"{path}:{start - 1}: this fence is never closed")
    return blocks


def as_script(blocks: list[Block]) -> str:
    """Return the Python blocks as one program whose line numbers are those of the document."""
    program: list[str] = []
    for block in blocks:
        if block.language == "python":
            program += [""] * (block.line - 1 - len(program))
            program += block.text.splitlines()
    return "\n".join(program) + "\n"
