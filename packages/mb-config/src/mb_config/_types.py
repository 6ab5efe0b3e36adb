# SPDX-License-Identifier: Apache-2.0
"""Checks of field values against their annotations and ranges, in plain sentences.

Every section runs ``checked`` at construction and at each assignment. Annotations are evaluated when
first needed, not at import, which keeps the import fast.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from mb_config.errors import ConfigError, Violation

SECTION_NAMES: dict[type, str] = {}
"""Where each section class sits in the container, for messages; filled by ``container``."""

_HINTS: dict[type, dict[str, Any]] = {}
_WORDS = {int: "an int", float: "a number", bool: "true or false", str: "a string"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_HOLDS = {
    "ge": lambda value, bound: value >= bound,
    "gt": lambda value, bound: value > bound,
    "le": lambda value, bound: value <= bound,
    "lt": lambda value, bound: value < bound,
}


def is_union(hint: object) -> bool:
    """Return whether *hint* is ``X | Y`` or ``Optional[X]``."""
    return get_origin(hint) in (Union, types.UnionType)


def expected(hint: Any) -> str:
    """Return what *hint* admits in words, such as ``"an int or null"``."""
    if hint is Any:
        return "plain data"
    if hint is type(None):
        return "null"
    if hint in _WORDS:
        return _WORDS[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) if isinstance(a, str) else str(a) for a in args)
    if is_union(hint):
        return " or ".join(expected(a) for a in args)
    if origin is list:
        return f"a list with each item {expected(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} items"
    if origin is dict:
        return f"a mapping with each value {expected(args[1])}"
    name: str = getattr(hint, "__name__", str(hint))
    return f"a {name}"


def _fits_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if value is None or isinstance(value, bool | int):
        return True
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, list | tuple):
        return all(map(_fits_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _fits_plain(v) for k, v in value.items())
    return False


def _encodable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def fits(value: object, hint: Any) -> bool:
    """Return whether *value* is what *hint* admits; bool is no int, nan and inf are no float."""
    if hint is Any:
        return _fits_plain(value)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if is_union(hint):
        return any(fits(value, a) for a in args)
    if origin is list:
        return isinstance(value, list) and all(fits(v, args[0]) for v in value)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(args)
            and all(fits(v, a) for v, a in zip(value, args, strict=True))
        )
    if origin is dict:
        return isinstance(value, dict) and all(
            isinstance(k, str) and _encodable(k) and fits(v, args[1]) for k, v in value.items()
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str) and _encodable(value)
    if getattr(hint, "_is_protocol", False):
        return hasattr(type(value), "__attrs_attrs__")
    return isinstance(value, hint)


def adapt(value: Any, hint: Any) -> Any:
    """Return *value* as *hint* keeps it: an int as float where only floats fit, a list as tuple."""
    if fits(value, hint):
        return value
    if is_union(hint):
        for option in get_args(hint):
            adapted = adapt(value, option)
            if fits(adapted, option):
                return adapted
        return value
    origin, args = get_origin(hint), get_args(hint)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    if origin is list and isinstance(value, list | tuple):
        return [adapt(v, args[0]) for v in value]
    if origin is dict and isinstance(value, Mapping):
        return {k: adapt(v, args[1]) for k, v in value.items()}
    return value


def show(value: object) -> str:
    """Return *value* as a message shows it: short, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def problem(value: object, hint: Any, bounds: Mapping[str, float]) -> tuple[str, str] | None:
    """Return the rule *value* breaks and its remedy, or None."""
    if not fits(value, hint):
        got = type(value).__name__
        return f"must be {expected(hint)}, not {got}" if not _choice(hint) else (
            f"must be {expected(hint)}"
        ), f"give {expected(hint)}"
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if not isinstance(item, int | float) or isinstance(item, bool):
            continue
        if not all(_HOLDS[name](item, bound) for name, bound in bounds.items()):
            span = " and ".join(f"{_SIGNS[name]} {bound}" for name, bound in bounds.items())
            return f"must be {span}", f"choose a value {span}"
    return None


def _choice(hint: Any) -> bool:
    return get_origin(hint) is Literal or (
        is_union(hint) and any(get_origin(a) is Literal for a in get_args(hint))
    )


def hints(cls: type) -> dict[str, Any]:
    """Return the type of each public field of an attrs class, by name."""
    known = _HINTS.get(cls)
    if known is None:
        names = vars(sys.modules[cls.__module__])
        known = _HINTS[cls] = {
            a.name: eval(a.type, names) if isinstance(a.type, str) else a.type  # noqa: S307
            for a in attrs.fields(cls)
            if a.init
        }
    return known


def checked(instance: object, attribute: attrs.Attribute[Any], value: Any) -> Any:
    """Return *value* as the field keeps it (an attrs ``on_setattr`` hook).

    Raises:
        ConfigError: If it is not what the field's annotation and bounds admit.
    """
    if not attribute.init:
        return value
    hint = hints(type(instance))[attribute.name]
    value = adapt(value, hint)
    found = problem(value, hint, attribute.metadata.get("bounds", {}))
    if found is not None:
        owner = type(instance)
        name = f"{SECTION_NAMES.get(owner, owner.__name__)}.{attribute.name}".lstrip(".")
        violation = Violation(field=name, value=show(value), rule=found[0], remedy=found[1])
        raise ConfigError.from_violations([violation])
    return value


def check_all(instance: Any) -> None:
    """Check every field of a new section (its ``__attrs_post_init__``)."""
    for attribute in attrs.fields(type(instance)):
        if attribute.init:
            value = checked(instance, attribute, getattr(instance, attribute.name))
            object.__setattr__(instance, attribute.name, value)
