# SPDX-License-Identifier: Apache-2.0
"""Makers of section fields that carry their range for checks and for the JSON Schema."""

from __future__ import annotations

from typing import Any

import attrs


def number(
    default: float | None,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Return a field for a number within bounds; the bounds hold for each item of a list, too.

    Args:
        default: The field's default.
        ge: Smallest value allowed.
        gt: Values must be greater than this.
        le: Largest value allowed.
        lt: Values must be smaller than this.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    kept = {name: bound for name, bound in bounds.items() if bound is not None}
    return attrs.field(default=default, metadata={"bounds": kept})


def numbers(factory: Any = list, *, ge: float | None = None, optional: bool = False) -> Any:
    """Return a field for a list of numbers, each at least *ge*; its default is empty or None."""
    metadata = {"bounds": {} if ge is None else {"ge": ge}}
    if optional:
        return attrs.field(default=None, metadata=metadata)
    return attrs.field(factory=factory, metadata=metadata)


def derived() -> Any:
    """Return a field that ``finalize`` fills in and that nobody sets; None before."""
    return attrs.field(default=None, metadata={"derived": True})
