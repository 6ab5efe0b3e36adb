# SPDX-License-Identifier: Apache-2.0
"""What a name given as ``mixed_precision`` stands for: ours, an installed package's, or your own.

A package offers recipes under the entry-point group ``mb.precision_recipes``, each a
``MixedPrecisionConfig`` or a function without arguments that returns one.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import attrs

from mb_config import plugins
from mb_config.errors import PluginError
from mb_config.sections.precision import PRECISIONS, MixedPrecisionConfig

if TYPE_CHECKING:
    from collections.abc import Callable

GROUP: Final = "mb.precision_recipes"
_REGISTERED: dict[str, MixedPrecisionConfig | Callable[[], MixedPrecisionConfig]] = {}


def register_precision(
    name: str, recipe: MixedPrecisionConfig | Callable[[], MixedPrecisionConfig]
) -> None:
    """Let configurations of this process say *name* for *recipe*.

    A configuration made in Python takes the ``MixedPrecisionConfig`` itself; a name is for files
    and command lines. Register it in every process that reads such a file, or have your package
    offer it as an entry point.

    Args:
        name: With underscores; files may write hyphens instead.
        recipe: The section, or a function that makes it.

    Raises:
        PluginError: If the name is taken, unless by an equal recipe.
    """
    key = _key(name)
    known = _REGISTERED.get(key)
    if key in PRECISIONS or (known is not None and known != recipe) or key in plugins.names(GROUP):
        raise PluginError(f"the precision recipe {name!r} exists already; choose another name")
    _REGISTERED[key] = recipe


def precision_names() -> tuple[str, ...]:
    """Return all names there are, ours first, without importing a plugin."""
    others = sorted({*_REGISTERED, *map(_key, plugins.names(GROUP))} - PRECISIONS.keys())
    return (*PRECISIONS, *others)


def find_precision(name: str) -> MixedPrecisionConfig | None:
    """Return a new section with what *name* stands for, None if nothing does.

    Raises:
        PluginError: If two packages claim the name, or what it leads to is no recipe.
    """
    key = _key(name)
    if key in PRECISIONS:
        return MixedPrecisionConfig(**PRECISIONS[key])
    if key in _REGISTERED:
        return _section(name, _REGISTERED[key])
    for installed in plugins.names(GROUP):
        if _key(installed) == key:
            return _section(name, plugins.load(GROUP, installed))
    return None


def fields_of(recipe: MixedPrecisionConfig) -> dict[str, Any]:
    """Return what *recipe* sets as plain data, without what is as by default."""
    plain = MixedPrecisionConfig()
    values = attrs.asdict(recipe, recurse=False)
    return {name: value for name, value in values.items() if value != getattr(plain, name)}


def _section(name: str, recipe: Any) -> MixedPrecisionConfig:
    made = recipe() if callable(recipe) else copy.copy(recipe)
    if not isinstance(made, MixedPrecisionConfig):
        raise PluginError(
            f"the precision recipe {name!r} is a {type(made).__name__}; it must be a"
            " MixedPrecisionConfig or a function that returns one"
        )
    return made


def _key(name: str) -> str:
    return name.replace("-", "_")
