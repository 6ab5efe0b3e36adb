# SPDX-License-Identifier: Apache-2.0
"""Lookup of plugins by entry-point group and name; built-ins are registered the same way."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from mb_config.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_PROVIDERS = {
    "mb.checkpointers": "mb-engine[ckpt]",
    "mb.callbacks": "mb-engine[logging]",
    "mb.metric_sinks": "mb-engine[logging]",
    "mb.model_transforms": "mb-engine[peft]",
    "mb.objectives": "mb-engine",
    "mb.model_families": "mb-engine",
    "mb.dataset_configs": "mb-config",
    "mb.peft_configs": "mb-config",
}


@functools.cache
def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    from importlib import metadata

    found = {(e.name, e.value): e for e in metadata.entry_points(group=group)}
    return tuple(found[key] for key in sorted(found))


def names(group: str) -> tuple[str, ...]:
    """Return the names registered under *group*, sorted, without importing any plugin."""
    return tuple(sorted({e.name for e in _entry_points(group)}))


@functools.cache
def load(group: str, name: str) -> Any:
    """Import and return the plugin *name* of *group*.

    Raises:
        PluginError: If nothing or more than one package claims the name, or its import fails.
    """
    claims = [e for e in _entry_points(group) if e.name == name]
    if not claims:
        package = _PROVIDERS.get(group)
        remedy = f'; pip install "{package}"' if package else "; install the package that has it"
        there = ", ".join(names(group)) or "nothing"
        raise PluginError(f"no {name!r} in {group!r}, which has {there}{remedy}")
    if len(claims) > 1:
        places = " and ".join(f"{e.value} ({_package(e)})" for e in claims)
        raise PluginError(f"{name!r} in {group!r} is claimed by {places}; uninstall one of them")
    try:
        return claims[0].load()
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"{name!r} in {group!r} ({claims[0].value}) cannot be imported: {error};"
            f" reinstall {_package(claims[0])}"
        ) from error


def name_of(group: str, cls: type) -> str | None:
    """Return the name under which *cls* is registered in *group*, or None."""
    full = f"{cls.__module__}:{cls.__qualname__}"
    root = cls.__module__.partition(".")[0]
    for entry in _entry_points(group):
        if entry.value == full:
            return entry.name
        if entry.value.partition(":")[0].partition(".")[0] == root and entry.load() is cls:
            return entry.name
    return None


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown package"
