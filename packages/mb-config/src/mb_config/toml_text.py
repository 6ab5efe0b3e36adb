# SPDX-License-Identifier: Apache-2.0
"""A small TOML writer for plain data; ``tomllib`` reads it back exactly."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from mb_config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_BARE = re.compile(r"^[A-Za-z0-9_-]+$")


def dumps(tree: Mapping[str, Any]) -> str:
    """Return *tree* as TOML text.

    Raises:
        ConfigError: If a value is None, which TOML cannot say.
    """
    lines: list[str] = []
    _table(tree, (), lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _table(tree: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {k: v for k, v in tree.items() if not isinstance(v, dict)}
    tables = {k: v for k, v in tree.items() if isinstance(v, dict)}
    if path and (plain or not tables):
        lines += ["", f"[{'.'.join(map(_key, path))}]"]
    lines += [f"{_key(k)} = {_value(v, (*path, k))}" for k, v in plain.items()]
    for key, table in tables.items():
        _table(table, (*path, key), lines)


def _key(key: str) -> str:
    return key if _BARE.match(key) else _string(key)


def _string(text: str) -> str:
    # JSON escapes are TOML's too, but for DEL, and for surrogate pairs, which stay unescaped here
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(v, path) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(k)} = {_value(v, (*path, k))}' for k, v in value.items())}}}"
    name = ".".join(path)
    raise ConfigError(f"{name}={value!r}: TOML has no null; write YAML or JSON instead")
