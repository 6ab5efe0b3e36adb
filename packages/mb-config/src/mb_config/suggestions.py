# SPDX-License-Identifier: Apache-2.0
"""Near names for mistyped ones."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` or, where nothing is near, the known names."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    short = [o for o in options if name in o or o in name]
    if len(short) == 1 and len(name) > 1:
        return f"did you mean {short[0]!r}?"
    shown = ", ".join(options[:30]) + (", ..." if len(options) > 30 else "")
    return f"known names: {shown}"
