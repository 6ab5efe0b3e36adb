# SPDX-License-Identifier: Apache-2.0
"""JSON Schema of configurations, for completion and checks in editors."""

from __future__ import annotations

import enum
import inspect
import pathlib
import re
from typing import Any, Literal, get_args, get_origin

import attrs

from mb_config import convert, plugins
from mb_config._types import hints, is_union
from mb_config.container import ConfigContainer
from mb_config.precisions import precision_names
from mb_config.provenance import default_of

_SCALARS: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    str: {"type": "string"},
    type(None): {"type": "null"},
    Any: {},
}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_FIELD = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")


def build() -> dict[str, Any]:
    """Return the JSON Schema that ``mb_config.json_schema`` promises."""
    definitions: dict[str, Any] = {}
    root = _object(ConfigContainer, definitions)
    names = sorted(precision_names())
    mixed = root["properties"]["mixed_precision"]["anyOf"]
    mixed[0] = {"enum": names + [n.replace("_", "-") for n in names if "_" in n]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mb-config",
        **root,
        "$defs": definitions,
    }


def descriptions(cls: type) -> dict[str, str]:
    """Return what the docstring of an attrs class says about each field."""
    found: dict[str, str] = {}
    names: list[str] = []
    lines = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[2].splitlines()
    for line in lines:
        start = _FIELD.match(line)
        if start:
            names = start[1].split(", ")
            found.update(dict.fromkeys(names, start[2]))
        elif line.startswith("        ") and names:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
        elif line.strip():
            break
    return found


def _object(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    about, types = descriptions(cls), hints(cls)
    properties = {}
    for field in attrs.fields(cls):
        if field.name not in types:
            continue
        bounds = {_BOUNDS[k]: v for k, v in field.metadata.get("bounds", {}).items()}
        schema = _schema(types[field.name], bounds, definitions)
        if field.name in about:
            schema["description"] = about[field.name]
        default = default_of(cls, field.name)
        if field.metadata.get("derived"):
            schema["readOnly"] = True
        elif not attrs.has(type(default)):
            schema["default"] = convert.unstructure(default)
        properties[field.name] = schema
    summary = inspect.cleandoc(cls.__doc__ or "").partition("\n\nAttributes:")[0]
    return {
        "type": "object",
        "description": " ".join(summary.split()),
        "properties": properties,
        "additionalProperties": False,
    }


def _schema(  # noqa: PLR0911 - one return a kind of type
    hint: Any, bounds: dict[str, Any], definitions: dict[str, Any]
) -> dict[str, Any]:
    if hint in _SCALARS:
        return {**_SCALARS[hint], **(bounds if hint in (int, float) else {})}
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return {"enum": list(args)}
    if is_union(hint):
        return {"anyOf": [_schema(a, bounds, definitions) for a in args]}
    if get_origin(hint) in (list, tuple):
        size = len(args) if get_origin(hint) is tuple else None
        sizes = {} if size is None else {"minItems": size, "maxItems": size}
        return {"type": "array", "items": _schema(args[0], bounds, definitions), **sizes}
    if get_origin(hint) is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], {}, definitions)}
    if hint in convert.VARIANTS:
        return _variants(hint, definitions)
    return _section(hint, definitions) if attrs.has(hint) else _foreign(hint)


def _foreign(hint: Any) -> dict[str, Any]:
    """Return the schema of a type that only strangers' sections have."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    return {"type": "string"} if hint is pathlib.Path else {}


def _section(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = _object(cls, definitions)
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _variants(protocol: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return one schema for each registered variant, told apart by its type."""
    group, _ = convert.VARIANTS[protocol]
    options = []
    for name in plugins.names(group):
        made = _object(plugins.load(group, name), definitions)
        made["properties"] = {"type": {"const": name}, **made["properties"]}
        made["required"] = ["type"]
        options.append(made)
    return {"anyOf": options}
