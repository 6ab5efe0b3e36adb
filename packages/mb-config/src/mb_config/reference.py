# SPDX-License-Identifier: Apache-2.0
"""Every field as Markdown: ``python -m mb_config.reference > docs/configuration-reference.md``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import attrs

from mb_config import plugins
from mb_config._types import expected, hints
from mb_config.container import ConfigContainer
from mb_config.convert import VARIANTS, unstructure, variant_of
from mb_config.provenance import default_of
from mb_config.schema import descriptions
from mb_config.sections.precision import PRECISIONS, MixedPrecisionConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD = """# Configuration reference

Every field, from the code: regenerate with `python -m mb_config.reference`. What the sections are
for and how they work together is in [the overview](configuration.md). "Derived" fields are filled
in by `finalize`; nobody sets them.
"""
_TABLE = "| field | takes | default | meaning |\n|---|---|---|---|"
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_OURS = ("text", "mock", "lora")


def markdown() -> str:
    """Return the reference page of all sections of this package."""
    about = descriptions(ConfigContainer)
    parts = [_HEAD]
    for name, hint in hints(ConfigContainer).items():
        for title, cls in _classes(name, hint):
            parts.append(f"## {title}\n\n{about[name]}\n")
            if cls is not None:
                parts.append(_fields(cls))
        if name == "mixed_precision":
            parts.append(_precisions())
    return "\n".join(parts)


def _classes(name: str, hint: Any) -> Iterator[tuple[str, type | None]]:
    protocol = variant_of(hint)
    if protocol is not None:
        group, _ = VARIANTS[protocol]
        for tag in plugins.names(group):
            if tag in _OURS:
                yield f"`{name}`, `type: {tag}`", plugins.load(group, tag)
    elif name == "mixed_precision":
        yield f"`{name}`", MixedPrecisionConfig
    else:
        yield f"`{name}`", hint if attrs.has(hint) else None


def _fields(cls: type) -> str:
    about, types = descriptions(cls), hints(cls)
    rows = [_TABLE]
    for field in attrs.fields(cls):
        default = f"`{json.dumps(unstructure(default_of(cls, field.name)), ensure_ascii=False)}`"
        if field.metadata.get("derived"):
            default = "derived"
        takes = expected(types[field.name]).replace("'", "`") + _range(
            field.metadata.get("bounds", {})
        )
        rows.append(f"| `{field.name}` | {takes} | {default} | {about[field.name]} |")
    return "\n".join(rows).replace("``", "`") + "\n"


def _range(bounds: dict[str, float]) -> str:
    words = " and ".join(f"{_SIGNS[k]} {v}" for k, v in bounds.items())
    return f", {words}" if words else ""


def _precisions() -> str:
    rows = ["| name | sets |", "|---|---|"]
    for name, fields in PRECISIONS.items():
        shown = ", ".join(f"{k} {json.dumps(v)}" for k, v in fields.items())
        rows.append(f"| `{name}` | {shown} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
