# SPDX-License-Identifier: Apache-2.0
"""Differences between two configurations, and a fingerprint of one."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from attrs import frozen

from mb_config import convert
from mb_config._types import show
from mb_config.errors import ConfigError
from mb_config.provenance import same
from mb_config.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config.container import ConfigContainer

MISSING = "(absent)"


@frozen(kw_only=True)
class Difference:
    """One field that differs.

    Attributes:
        field: Dotted path.
        left: Value here, ``"(absent)"`` where there is no such field.
        right: Value there.
    """

    field: str
    left: Any
    right: Any

    def __str__(self) -> str:
        left, right = (v if v is MISSING else show(v) for v in (self.left, self.right))
        return f"{self.field}: {left} -> {right}"


def diff(left: ConfigContainer, right: ConfigContainer) -> tuple[Difference, ...]:
    """Return what differs between two configurations, in the order of fields."""
    return tuple(_differences(convert.unstructure(left), convert.unstructure(right), ""))


def _differences(left: Any, right: Any, path: str) -> Iterator[Difference]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(k for k in right if k not in left)]:
            below = f"{path}.{key}" if path else key
            yield from _differences(left.get(key, MISSING), right.get(key, MISSING), below)
    elif not same(left, right):
        yield Difference(field=path, left=left, right=right)


def fingerprint(config: ConfigContainer, *sections: str) -> str:
    """Return 16 hex digits of the SHA-256 of the canonical JSON of *sections*, or of everything.

    Raises:
        ConfigError: If a section does not exist.
    """
    data = convert.unstructure(config)
    for name in sections:
        if name not in data:
            raise ConfigError(f"fingerprint: no section {name!r}; {did_you_mean(name, data)}")
    kept = {name: data[name] for name in sections} if sections else data
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
