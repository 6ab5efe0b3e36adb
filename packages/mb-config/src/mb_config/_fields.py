# SPDX-License-Identifier: Apache-2.0
"""Makers of section fields that carry their range for checks and for the JSON Schema."""

from __future__ import annotations

from typing import Any

import attrs


def within(
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> dict[str, Any]:
    """Return field metadata with the bounds of a number, or of each number in a list.

    Args:
        ge: Smallest value allowed.
        gt: Values must be greater than this.
        le: Largest value allowed.
        lt: Values must be smaller than this.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return {"bounds": {name: bound for name, bound in bounds.items() if bound is not None}}


def number(
    default: float | None,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Return a field for a number within the bounds of ``within``."""
    return attrs.field(default=default, metadata=within(ge=ge, gt=gt, le=le, lt=lt))


def derived() -> Any:
    """Return a field that ``finalize`` fills in and that nobody sets; None before."""
    return attrs.field(default=None, metadata={"derived": True})
