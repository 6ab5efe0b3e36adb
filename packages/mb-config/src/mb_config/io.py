# SPDX-License-Identifier: Apache-2.0
"""Containers to and from plain data and files."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from mb_config import convert, files
from mb_config.container import ConfigContainer
from mb_config.provenance import Origin, get, leaves
from mb_config.resolve.draft import Draft

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping


def to_dict(config: ConfigContainer, *, derived: bool) -> dict[str, Any]:
    """Return *config* as plain data, with or without what finalize derived."""
    data: dict[str, Any] = convert.unstructure(config if derived else asked_for(config))
    return data


def asked_for(config: ConfigContainer) -> ConfigContainer:
    """Return a copy of *config* without what finalize derived."""
    draft = Draft(config=copy.deepcopy(config), world_size=1)
    draft.withdraw()
    return draft.config


def from_dict(data: Mapping[str, Any]) -> ConfigContainer:
    """Return the container that *data* describes."""
    made: ConfigContainer = convert.structure(dict(data), ConfigContainer, source="")
    return made


def load(path: str | os.PathLike[str], kind: str) -> ConfigContainer:
    """Return the container in a file; each value the file sets remembers that."""
    data = files.read(path, kind)
    config: ConfigContainer = convert.structure(data, ConfigContainer, source=str(path))
    for leaf, value in leaves(config):
        if _is_given(data, leaf):
            origin = Origin(kind="file", value=copy.deepcopy(value), text=str(path))
            config._origins[leaf] = origin  # noqa: SLF001 - this module is the container's own
    return config


def _is_given(data: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def save(config: ConfigContainer, kind: str, path: str | os.PathLike[str] | None) -> str:
    """Return *config* as text of a *kind*, without derived values, and write it if asked to."""
    text = files.dump(to_dict(config, derived=False), kind)
    if kind == "YAML":
        text += _comments(config)
    if path is not None:
        files.write(path, text)
    return text


def _comments(config: ConfigContainer) -> str:
    """Return what was derived as comment lines; text with line breaks cannot end a comment."""
    origins = config._origins  # noqa: SLF001 - this module is the container's own
    paths = [p for p, o in origins.items() if o.kind == "derived" and get(config, p) == o.value]
    if not paths:
        return ""
    lines = [
        " ".join(config.explain(p).splitlines()[:1])
        for p in sorted(paths)
        if not hasattr(get(config, p), "__attrs_attrs__")
    ]
    return "\n".join(
        [
            "",
            "# Derived when this was written, not read again:",
            *(f"#   {line}" for line in lines),
            "",
        ]
    )
