# SPDX-License-Identifier: Apache-2.0
"""Checks of field values against their annotations and ranges, in plain sentences.

Every section runs ``checked`` at construction and at each assignment. Annotations are evaluated when
first needed, not at import, which keeps the import fast.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from mb_config.errors import ConfigError, Violation

SECTION_NAMES: dict[type, str] = {}
"""Where each section class sits in the container, for messages; filled by ``container``."""

_HINTS: dict[type, dict[str, Any]] = {}
_WORDS: dict[Any, str] = {
    int: "an int",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
    Any: "plain data",
}
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
    if hint in _WORDS:
        return _WORDS[hint]
    args = get_args(hint)
    words = _IN_WORDS.get(_kind(hint))
    if words is not None:
        return words(args)
    return f"a {getattr(hint, '__name__', hint)}"


@functools.cache
def _kind(hint: Any) -> Any:
    return Union if is_union(hint) else get_origin(hint)


_IN_WORDS: dict[Any, Callable[[tuple[Any, ...]], str]] = {
    Union: lambda args: " or ".join(map(expected, args)),
    Literal: lambda args: "one of " + ", ".join(map(repr, args)),
    list: lambda args: f"a list with each item {expected(args[0])}",
    tuple: lambda args: f"a list of {len(args)} items, each {expected(args[0])}",
    dict: lambda args: f"a mapping with each value {expected(args[1])}",
}


def _fits_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_fits_plain, value))
    if isinstance(value, dict):
        return all(_fits_text(k) and _fits_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int) or _fits_float(value) or _fits_text(value)


def _fits_float(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _fits_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _fits_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fits_tuple(value: object, args: tuple[Any, ...]) -> bool:
    if not isinstance(value, tuple) or len(value) != len(args):
        return False
    return all(map(fits, value, args))


def _fits_dict(value: object, args: tuple[Any, ...]) -> bool:
    return isinstance(value, dict) and all(
        _fits_text(k) and fits(v, args[1]) for k, v in value.items()
    )


_FITS: dict[Any, Callable[[object], bool]] = {
    Any: _fits_plain,
    int: _fits_int,
    float: _fits_float,
    str: _fits_text,
}
_FITS_MADE_OF: dict[Any, Callable[[object, tuple[Any, ...]], bool]] = {
    Union: lambda value, args: any(fits(value, a) for a in args),
    Literal: lambda value, args: any(type(value) is type(a) and value == a for a in args),
    list: lambda value, args: isinstance(value, list) and all(fits(v, args[0]) for v in value),
    tuple: _fits_tuple,
    dict: _fits_dict,
}


def fits(value: object, hint: Any) -> bool:
    """Return whether *value* is what *hint* admits; bool is no int, nan and inf are no float."""
    simple = _FITS.get(hint)
    if simple is not None:
        return simple(value)
    made_of = _FITS_MADE_OF.get(_kind(hint))
    if made_of is not None:
        return made_of(value, get_args(hint))
    if getattr(hint, "_is_protocol", False):
        return attrs.has(type(value))
    return isinstance(value, hint)


def adapt(value: Any, hint: Any) -> Any:
    """Return *value* as *hint* keeps it, where nothing is lost: 1 as 1.0, 1e9 as int, a list as tuple.

    A value that *hint* does not admit comes back as it is.
    """
    if fits(value, hint):
        return value
    change = _ADAPT.get(_kind(hint) or hint)
    return value if change is None else change(value, get_args(hint))


def _adapt_union(value: Any, args: tuple[Any, ...]) -> Any:
    for option in args:
        adapted = adapt(value, option)
        if fits(adapted, option):
            return adapted
    return value


def _adapt_int(value: Any, _: tuple[Any, ...]) -> Any:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value


def _adapt_list(value: Any, args: tuple[Any, ...]) -> Any:
    return [adapt(v, args[0]) for v in value] if isinstance(value, list | tuple) else value


def _adapt_dict(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: adapt(v, args[1]) for k, v in value.items()}


_ADAPT: dict[Any, Callable[[Any, tuple[Any, ...]], Any]] = {
    Union: _adapt_union,
    float: lambda value, _: float(value) if _fits_int(value) else value,
    int: _adapt_int,
    tuple: lambda value, _: tuple(value) if isinstance(value, list) else value,
    list: _adapt_list,
    dict: _adapt_dict,
}


def show(value: object) -> str:
    """Return *value* as a message shows it: short, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def problem(value: object, hint: Any, bounds: Mapping[str, float]) -> tuple[str, str] | None:
    """Return the rule *value* breaks and its remedy, or None."""
    if not fits(value, hint):
        wanted = expected(hint)
        got = "" if isinstance(value, str) and "one of" in wanted else f", not {_name(value)}"
        return f"must be {wanted}{got}", f"give {wanted}"
    items = value if isinstance(value, list | tuple) else [value]
    for item in items:
        if not isinstance(item, int | float) or isinstance(item, bool):
            continue
        if not all(_HOLDS[name](item, bound) for name, bound in bounds.items()):
            span = " and ".join(f"{_SIGNS[name]} {bound}" for name, bound in bounds.items())
            return f"must be {span}", f"choose a value {span}"
    return None


def _name(value: object) -> str:
    return _WORDS.get(type(value), f"a {type(value).__name__}")


def hints(cls: type) -> dict[str, Any]:
    """Return the type of each public field of an attrs class, by name.

    An annotation of a stranger that cannot be evaluated, as its names are imported for type
    checkers alone, counts as plain data.
    """
    known = _HINTS.get(cls)
    if known is None:
        names = vars(sys.modules[cls.__module__])
        known = _HINTS[cls] = {
            a.name: _evaluated(a.type, names) for a in attrs.fields(cls) if a.init
        }
    return known


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return Any if annotation is None else annotation
    try:
        return eval(annotation, names)  # noqa: S307 - the text of a class's own annotation
    except NameError:
        return Any


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


def concise(self: Any) -> str:
    """Return the section with the fields that differ from their defaults (its ``__repr__``).

    Shared by all sections: a method generated for each would make the import slower.
    """
    shown = [
        f"{a.name}={value!r}"
        for a in attrs.fields(type(self))
        if a.repr and (value := getattr(self, a.name)) != default_of(a)
    ]
    return f"{type(self).__name__}({', '.join(shown)})"


def default_of(attribute: attrs.Attribute[Any]) -> Any:
    """Return the default of a field, new if it is a list, dict or section."""
    default: Any = attribute.default
    return default.factory() if isinstance(default, _FACTORY) else default


_FACTORY: Any = attrs.Factory
