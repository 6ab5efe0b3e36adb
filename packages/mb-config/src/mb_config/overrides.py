# SPDX-License-Identifier: Apache-2.0
"""Dotted overrides: ``train.lr=3e-4``, ``peft.rank=8`` (makes the section), ``~peft`` (unsets)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import attrs

from mb_config import convert, yaml_text
from mb_config._types import hints, is_union
from mb_config.errors import ConfigError, Violation
from mb_config.provenance import Origin, default_of, get, leaves
from mb_config.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mb_config.container import ConfigContainer


def apply(config: ConfigContainer, overrides: Iterable[str]) -> ConfigContainer:
    """Return a copy of *config* with *overrides* applied in order; *config* stays as it is.

    ``path=value`` sets a field, ``path`` of a section with a mapping replaces fields of it, and
    ``~path`` puts a field or section back to its default. Values are YAML: ``3e-4`` is a float,
    ``[1, 2]`` a list, ``null`` None, ``'1'`` a string. ``section.type=name`` switches a variant
    and begins it anew. A path below a mapping such as ``model.megatron.x=1`` sets its key.

    Raises:
        ConfigError: Naming the override, with a near name for an unknown field.
    """
    made = copy.deepcopy(config)
    for override in overrides:
        made = _apply_one(made, override)
    return made


def _apply_one(config: ConfigContainer, override: str) -> ConfigContainer:
    text = override.strip()
    if text.startswith("~"):
        return _unset(config, text[1:].strip(), override)
    path, equals, value_text = text.lstrip("+").partition("=")
    path = path.strip()
    if not equals or not path:
        raise ConfigError(
            f"override {override!r}: must look like section.field=value; or ~section to unset"
        )
    try:
        value = yaml_text.loads(value_text)
    except ValueError as error:
        raise ConfigError(
            f"override {override!r}: {value_text!r} is not a YAML value ({error}); quote it"
        ) from error
    return _set(config, path, value, override)


def _set(config: ConfigContainer, path: str, value: Any, override: str) -> ConfigContainer:
    """Set *path* in plain data and structure only the section it is in, anew."""
    name, _, rest = path.partition(".")
    types = hints(type(config))
    if name not in types:
        hint = did_you_mean(name, types)
        raise _refused(override, path, value, f"unknown section {name!r}", hint)
    if not rest:
        new = _merged(convert.field_data(config, name), value)
    else:
        new = _section_data(config, name, override)
        if rest == "type" and new.get("type") != value:
            new = {}
        _place(new, rest.split("."), value)
    section = convert.structure({name: new}, type(config), source=f"override {override!r}")
    before = dict(leaves(getattr(config, name), name)) if _is_section(config, name) else {}
    setattr(config, name, getattr(section, name))
    _remember(config, name, path, before, override)
    return config


def _is_section(config: ConfigContainer, name: str) -> bool:
    return attrs.has(type(getattr(config, name)))


def _merged(old: Any, value: Any) -> Any:
    """Return *value*, laid over *old* if both are mappings of the same variant."""
    if (
        isinstance(old, dict)
        and isinstance(value, dict)
        and (value.get("type", old.get("type")) == old.get("type"))
    ):
        return {**old, **value}
    return value


def _section_data(config: ConfigContainer, name: str, override: str) -> dict[str, Any]:
    """Return the section as plain data, made with its defaults if there is none yet."""
    current = getattr(config, name)
    hint = hints(type(config))[name]
    protocol = convert.variant_of(hint)
    if attrs.has(type(current)):
        data: dict[str, Any] = convert.field_data(config, name)
        return data
    if isinstance(current, dict):
        return copy.deepcopy(current)
    if protocol is not None:
        return {"type": convert.VARIANTS[protocol][1]}
    if isinstance(current, str) and is_union(hint):
        # a named mixed precision becomes a section that starts from what the name means
        return _named(name, current, override)
    return {}


def _named(name: str, value: str, override: str) -> dict[str, Any]:
    from mb_config.precisions import fields_of, find_precision, precision_names

    found = find_precision(value)
    if found is None:
        near = did_you_mean(value, precision_names())
        raise _refused(override, name, value, f"unknown name {value!r}", near)
    return fields_of(found)


def _place(data: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        inner = data.get(part)
        data[part] = data = dict(inner) if isinstance(inner, dict) else {}
    data[parts[-1]] = value


def _remember(
    config: ConfigContainer, name: str, path: str, before: dict[str, Any], override: str
) -> None:
    """Record *override* as the origin of what it set; a value it names is no longer derived."""
    origins = config._origins  # noqa: SLF001 - this module is the container's own
    current = getattr(config, name)
    now = dict(leaves(current, name)) if attrs.has(type(current)) else {name: current}
    for leaf, value in now.items():
        named = leaf == path or path.startswith(f"{leaf}.")
        if named or leaf not in before or before[leaf] != value:
            origins[leaf] = Origin(kind="override", value=copy.deepcopy(value), text=repr(override))
    for leaf in [o for o in origins if o.partition(".")[0] == name and o not in now]:
        del origins[leaf]


def _unset(config: ConfigContainer, path: str, override: str) -> ConfigContainer:
    place, _, name = path.rpartition(".")
    try:
        owner = get(config, place) if place else config
        get(config, path)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}", error.violations) from error
    if isinstance(owner, dict):
        del owner[name]
        return config
    setattr(owner, name, default_of(type(owner), name))
    origins = config._origins  # noqa: SLF001 - this module is the container's own
    for leaf in [o for o in origins if o == path or o.startswith(f"{path}.")]:
        del origins[leaf]
    return config


def _refused(override: str, path: str, value: Any, rule: str, remedy: str) -> ConfigError:
    violation = Violation(field=path, value=repr(value), rule=rule, remedy=remedy)
    return ConfigError(f"override {override!r}: {rule}; {remedy}", [violation])
