# SPDX-License-Identifier: Apache-2.0
"""Plain data to sections and back: the one cattrs converter.

Keys are strict, values are never coerced (the string "3" is no int), variants are told apart by
``type:``, and every problem of a file is found in one go, each with its dotted path.
"""

from __future__ import annotations

import enum
import functools
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs
import cattrs

from mb_config import plugins
from mb_config._types import SECTION_NAMES, adapt, expected, hints, is_union, problem, show
from mb_config.errors import ConfigError, PluginError, Violation
from mb_config.sections import DatasetConfig, PEFTConfig
from mb_config.suggestions import did_you_mean

VARIANTS: dict[type, tuple[str, str]] = {
    DatasetConfig: ("mb.dataset_configs", "text"),
    PEFTConfig: ("mb.peft_configs", "lora"),
}
"""Tagged unions: their protocol, the entry-point group of their variants, the first to take."""


class _Problems(Exception):  # noqa: N818 - never leaves this module
    """Violations found below one key; paths are relative to it."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__(violations)
        self.violations = violations


def _single(value: object, rule: str, remedy: str) -> _Problems:
    return _Problems([Violation(field="", value=show(value), rule=rule, remedy=remedy)])


def _below(name: str, violation: Violation) -> Violation:
    path = f"{name}.{violation.field}" if violation.field else name
    return attrs.evolve(violation, field=path)


def variant_of(hint: Any) -> type | None:
    """Return the protocol of a tagged union that *hint* is or contains."""
    options = get_args(hint) if is_union(hint) else (hint,)
    return next((o for o in options if o in VARIANTS), None)


@functools.cache
def converter() -> cattrs.Converter:
    """Return the converter; a stranger may register hooks for types of its own sections."""
    made = cattrs.Converter(forbid_extra_keys=True)
    for protocol in VARIANTS:
        made.register_structure_hook(protocol, _structure_variant)
    made.register_structure_hook_func(_is_plain, _structure_plain)
    for scalar in (int, float, str, bool):
        made.register_structure_hook(scalar, _structure_plain)
    made.register_structure_hook_func(_has_optional_section, _structure_optional)
    made.register_structure_hook_factory(attrs.has, lambda cls: functools.partial(_structure, cls))
    made.register_structure_hook_func(_is_enum, _structure_enum)
    made.register_structure_hook(Path, lambda value, _: Path(_structure_plain(value, str)))
    made.register_unstructure_hook(Path, str)
    made.register_unstructure_hook_factory(attrs.has, lambda _: _unstructure)
    return made


def _is_plain(hint: Any) -> bool:
    """Return whether *hint* is made of scalars, lists, dicts and choices alone."""
    if hint in (Any, int, float, str, bool, type(None)) or get_origin(hint) is Literal:
        return True
    if get_origin(hint) in (list, tuple, dict) or is_union(hint):
        return all(map(_is_plain, get_args(hint)))
    return False


def _has_optional_section(hint: Any) -> bool:
    return is_union(hint) and any(attrs.has(a) or a in VARIANTS for a in _sections(hint))


def _sections(hint: Any) -> list[Any]:
    return [a for a in get_args(hint) if isinstance(a, type)]


def _structure_plain(value: Any, hint: Any) -> Any:
    value = adapt(value, hint)
    found = problem(value, hint, {})
    if found is not None:
        raise _single(value, *found)
    return value


def _structure_optional(value: Any, hint: Any) -> Any:
    """Return a section for a mapping; anything else is one of the other options."""
    if isinstance(value, dict):
        section = next(a for a in _sections(hint) if attrs.has(a) or a in VARIANTS)
        return converter().structure(value, section)
    return _structure_plain(value, hint)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _structure_enum(value: Any, cls: type[enum.Enum]) -> Any:
    values = [member.value for member in cls]
    if value not in values:
        wanted = f"one of {', '.join(map(repr, values))}"
        raise _single(value, f"must be {wanted}", f"give {wanted}")
    return cls(value)


def _structure_variant(value: Any, protocol: type) -> Any:
    group, example = VARIANTS[protocol]
    if not isinstance(value, dict):
        raise _single(value, "must be a mapping with a type", f"begin it with 'type: {example}'")
    known = ", ".join(plugins.names(group))
    if "type" not in value:
        raise _Problems(
            [
                Violation(
                    field="type",
                    value="missing",
                    rule=f"must be one of {known}",
                    remedy=f"add 'type: {example}'",
                )
            ]
        )
    tag = value["type"]
    try:
        cls = plugins.load(group, tag) if isinstance(tag, str) else None
    except PluginError as error:
        if tag in plugins.names(group):
            raise
        raise _unknown_type(tag, group, known) from error
    if cls is None:
        raise _unknown_type(tag, group, known)
    rest = {k: v for k, v in value.items() if k != "type"}
    return converter().structure(rest, cls)


def _unknown_type(tag: Any, group: str, known: str) -> _Problems:
    near = did_you_mean(str(tag), plugins.names(group))
    remedy = near if near.startswith("did") else f"choose one, or register yours under {group!r}"
    return _Problems(
        [Violation(field="type", value=show(tag), rule=f"must be one of {known}", remedy=remedy)]
    )


def _structure(cls: type, value: Any, _: Any = None) -> Any:
    if not isinstance(value, dict):
        raise _single(value, "must be a mapping", "give its fields below it")
    types = hints(cls)
    found: list[Violation] = []
    given: dict[str, Any] = {}
    for key, item in value.items():
        if key not in types:
            found.append(_unknown_key(cls, str(key), item))
            continue
        try:
            given[key] = converter().structure(item, types[key])
        except _Problems as below:
            found += [_below(key, v) for v in below.violations]
        except (TypeError, ValueError, cattrs.BaseValidationError) as error:
            # a stranger's type with a hook of its own
            rule = f"must be {expected(types[key])}"
            found.append(Violation(field=key, value=show(item), rule=rule, remedy=_line(error)))
    if found:
        raise _Problems(found)
    try:
        return cls(**{name.lstrip("_"): value for name, value in given.items()})
    except ConfigError as error:
        names = [attrs.evolve(v, field=v.field.rpartition(".")[2]) for v in error.violations]
        raise _Problems(names) from error
    except (TypeError, ValueError) as error:
        # a stranger's class with validators of its own
        raise _single(value, f"is no valid {cls.__name__}", _line(error)) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _unknown_key(cls: type, key: str, item: Any) -> Violation:
    """Return the violation, naming a near key, or the section that has the key."""
    own = SECTION_NAMES.get(cls, cls.__name__)
    place = f" in {own!r}" if own else ""
    others = sorted({name for c, name in SECTION_NAMES.items() if name and key in hints(c)})
    remedy = did_you_mean(key, hints(cls))
    if others and not remedy.startswith("did you mean"):
        remedy = f"did you mean {' or '.join(f'{name}.{key}' for name in others)}?"
    return Violation(field=key, value=show(item), rule=f"unknown key {key!r}{place}", remedy=remedy)


def _unstructure(section: Any) -> dict[str, Any]:
    types = hints(type(section))
    return {name: _unstructure_field(getattr(section, name), types[name]) for name in types}


def _unstructure_field(value: Any, hint: Any) -> Any:
    plain = converter().unstructure(value)
    protocol = variant_of(hint)
    if protocol is None or not attrs.has(type(value)):
        return plain
    cls, (group, _) = type(value), VARIANTS[protocol]
    # a class that nobody registered can be logged, but a file with it cannot be read back
    return {"type": plugins.name_of(group, cls) or f"{cls.__module__}:{cls.__qualname__}", **plain}


def structure(data: Any, cls: type, *, source: str) -> Any:
    """Return a *cls* made of plain *data*.

    Args:
        data: Nested dicts, lists and scalars.
        cls: An attrs class.
        source: Where *data* is from, for messages; empty for nowhere in particular.

    Raises:
        ConfigError: With every unknown key and every wrong type.
    """
    try:
        return converter().structure(data, cls)
    except _Problems as problems:
        error = ConfigError.from_violations(problems.violations)
        message = f"{source}: {error}" if source else str(error)
        raise ConfigError(message, problems.violations) from None


def field_data(section: Any, name: str) -> Any:
    """Return one field of *section* as plain data, with its type if it is a variant."""
    return _plain(_unstructure_field(getattr(section, name), hints(type(section))[name]))


def unstructure(section: Any) -> Any:
    """Return *section* as plain data that ``structure`` turns back into an equal one."""
    return _plain(converter().unstructure(section))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
