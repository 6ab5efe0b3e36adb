# SPDX-License-Identifier: Apache-2.0
"""Where values come from: default, file, override, assignment in Python, or derived by finalize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import frozen

from mb_config import _types
from mb_config._types import hints, show
from mb_config.errors import ConfigError, Violation
from mb_config.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config.container import ConfigContainer


@frozen(kw_only=True)
class Origin:
    """Where the value of one field came from.

    It holds as long as the field still has ``value``; after an assignment the field is the user's.

    Attributes:
        kind: Kind of source.
        value: The value the field was given.
        text: The file's or override's name, or the calculation, in words.
        base: For derived values, what the field was before and becomes again before the next
            derivation.
    """

    kind: Literal["file", "override", "derived"]
    value: Any
    text: str
    base: Any = None


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted path, value)`` of every field that is not itself a section."""
    for name in hints(type(section)):
        value = getattr(section, name)
        path = f"{prefix}.{name}" if prefix else name
        if attrs.has(type(value)):
            yield from leaves(value, path)
        else:
            yield path, value


def get(config: Any, path: str) -> Any:
    """Return the value at the dotted *path*; below a mapping, a key of it.

    Raises:
        ConfigError: Naming the part that does not exist, with a near name.
    """
    value: Any = config
    done: list[str] = []
    for part in path.split("."):
        known = list(value) if isinstance(value, dict) else _names(value)
        if part not in known:
            place = ".".join(done)
            where = f" in {place!r}" if place else ""
            hint = did_you_mean(part, known) if known else f"{place} has no fields"
            rule = Violation(field=path, value="?", rule=f"no {part!r}{where}", remedy=hint)
            raise ConfigError(f"{path}: {rule.rule}; {rule.remedy}", [rule])
        value = value[part] if isinstance(value, dict) else getattr(value, part)
        done.append(part)
    return value


def _names(value: Any) -> list[str]:
    return list(hints(type(value))) if attrs.has(type(value)) else []


def put(config: Any, path: str, value: Any) -> None:
    """Set the field at the dotted *path*, which must exist."""
    place, _, name = path.rpartition(".")
    setattr(get(config, place) if place else config, name, value)


def explain(config: ConfigContainer, path: str) -> str:
    """Return ``path = value, where from``; a line for each field if *path* is a section."""
    value = get(config, path)
    if attrs.has(type(value)):
        return "\n".join(_line(config, p, v) for p, v in leaves(value, path))
    return _line(config, path, value)


def _line(config: ConfigContainer, path: str, value: Any) -> str:
    text = value if isinstance(value, str) else show(value)
    return f"{path} = {text}, {_source(config, path, value)}"


def _source(config: ConfigContainer, path: str, value: Any) -> str:
    origin = config._origins.get(path)  # noqa: SLF001 - this module is the container's own
    if origin is not None and same(origin.value, value):
        if origin.kind == "derived":
            return f"derived: {origin.text}"
        return f"from {origin.kind} {origin.text}"
    above = path.rpartition(".")[0]
    whole = config._origins.get(above)  # noqa: SLF001
    if whole is not None and same(whole.value, get(config, above)):
        return f"{whole.kind}: {whole.text}"
    if same(_default(config, path), value):
        return "default"
    return "set in Python"


def _default(config: ConfigContainer, path: str) -> Any:
    """Return the default of the field at *path*, for the variants *config* has."""
    place, _, name = path.rpartition(".")
    owner = type(get(config, place)) if place else type(config)
    if not attrs.has(owner):
        return _NOTHING
    return default_of(owner, name)


def default_of(cls: type, name: str) -> Any:
    """Return the default of one field of an attrs class, new if it is a list, dict or section."""
    return _types.default_of(attrs.fields_dict(cls)[name])


_NOTHING = object()


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal and of one type, so that 1, 1.0 and True differ."""
    return type(a) is type(b) and bool(a == b)
