# SPDX-License-Identifier: Apache-2.0
"""The record of one tensor that is kept for the backward pass."""

from __future__ import annotations

from attrs import frozen


@frozen
class Saved:
    """A storage that autograd keeps.

    Attributes:
        name: What it is, in words.
        part: Part of the layer that it belongs to; recomputation drops whole parts.
        size: Bytes.
        input_bytes: Bytes that remain of it where its part is recomputed, as it is an input of that.
    """

    name: str
    part: str
    size: float
    input_bytes: float = 0.0
