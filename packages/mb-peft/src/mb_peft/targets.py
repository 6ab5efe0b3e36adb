# SPDX-License-Identifier: Apache-2.0
"""From patterns to the names of modules.

A pattern means the modules whose name, or whose name's end from some dot on, it matches: ``q_proj``
and ``self_attn.q_proj`` and ``layers.0.*.q_proj`` all mean
``model.layers.0.self_attn.q_proj``. ``*`` stands for anything, dots included; ``?`` and ``[...]``
as in shell patterns.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import TYPE_CHECKING

from mb_peft.errors import PeftError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NEAR = 3


def matches(name: str, pattern: str) -> bool:
    """Return whether *pattern* means the module *name*."""
    return any(fnmatch.fnmatchcase(end, pattern) for end in _ends(name))


def select(
    names: Sequence[str], patterns: Iterable[str], *, exclude: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Return the names that each pattern means, without those that *exclude* means.

    Raises:
        PeftError: If a pattern, of either kind, means no name; lists near ones.
    """
    excluded = {name for pattern in exclude for name in _matched(names, pattern, "exclude_modules")}
    return {
        pattern: [n for n in _matched(names, pattern, "target_modules") if n not in excluded]
        for pattern in patterns
    }


def _matched(names: Sequence[str], pattern: str, field: str) -> list[str]:
    found = [name for name in names if matches(name, pattern)]
    if not found:
        raise PeftError(
            f"{field}: '{pattern}' matches no module of the model; near names: "
            f"{', '.join(near(names, pattern)) or 'none'}"
        )
    return found


def near(names: Sequence[str], pattern: str) -> list[str]:
    """Return up to three names whose ends look most like *pattern*; layers count once."""
    width = pattern.count(".") + 1
    ends: dict[str, str] = {}
    for name in names:
        end = ".".join(name.split(".")[-width:])
        ends.setdefault(end, re.sub(r"\.\d+\.", ".*.", name))
    plain = pattern.replace("*", "").strip(".")
    close = difflib.get_close_matches(plain, ends, n=NEAR, cutoff=0.3)
    return list(dict.fromkeys(ends[end] for end in close))


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
