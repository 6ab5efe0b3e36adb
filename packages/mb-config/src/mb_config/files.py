# SPDX-License-Identifier: Apache-2.0
"""Configuration files: YAML, JSON and TOML read to plain data, and written from it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mb_config import toml_text, yaml_text
from mb_config.errors import ConfigError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable


def read(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Return the mapping a file holds; an empty YAML file is an empty mapping.

    Args:
        path: The file.
        kind: ``"YAML"``, ``"JSON"`` or ``"TOML"``.

    Raises:
        ConfigError: Naming the file, and the line where it is malformed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a {kind} file") from error
    return parse(text, kind, str(path))


def parse(text: str, kind: str, source: str) -> dict[str, Any]:
    """Return the mapping *text* holds.

    Raises:
        ConfigError: Naming *source*.
    """
    try:
        data = _LOADS[kind](text)
    except ValueError as error:
        raise ConfigError(f"{source}: not valid {kind}: {error}; correct the file") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        name = type(data).__name__
        raise ConfigError(f"{source}: holds a {name}; a configuration is a mapping of sections")
    return data


def dump(tree: dict[str, Any], kind: str) -> str:
    """Return *tree* as text.

    Raises:
        ConfigError: If TOML cannot say a value.
    """
    return _DUMPS[kind](tree)


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write *text* to *path*.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error}); choose another path") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _loads_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


def _dumps_json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _dumps_toml(tree: dict[str, Any]) -> str:
    return toml_text.dumps(without_nulls(tree))


def without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    """Return *tree* without the sections and fields that are None, their default."""
    kept = {k: v for k, v in tree.items() if v is not None}
    return {
        k: {n: x for n, x in v.items() if x is not None} if isinstance(v, dict) else v
        for k, v in kept.items()
    }


_LOADS: dict[str, Callable[[str], Any]] = {
    "YAML": yaml_text.loads,
    "JSON": _loads_json,
    "TOML": tomllib.loads,
}
_DUMPS: dict[str, Callable[[dict[str, Any]], str]] = {
    "YAML": yaml_text.dumps,
    "JSON": _dumps_json,
    "TOML": _dumps_toml,
}
