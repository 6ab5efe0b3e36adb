# SPDX-License-Identifier: Apache-2.0
"""Which tensors can be stored as they are."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from attrs import frozen
from torch import Tensor

from mb_ckpt.errors import CheckpointError

TENSORS: frozenset[type] = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))
"""Types of tensors that are nothing but their values; other subclasses mean something more."""

Rows = Callable[[int, int], Tensor]
"""Returns rows of a tensor, from the first up to and without the second number."""


@frozen(kw_only=True, eq=False)
class TensorToRead:
    """A tensor of a state that is read while it is written, and stored as a plain tensor is.

    Attributes:
        dtype: Of the values.
        shape: Of the values.
        read_rows: Returns the rows ``start:stop`` along the first dimension, on the CPU; of a tensor
            without dimensions, called with 0 and 1, all of it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read_rows: Rows

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * self.dtype.itemsize


def check_storable(data: Tensor, key: str) -> None:
    """Refuse kinds of tensors whose values are not all in their own dense memory."""
    if type(data) not in TENSORS:
        raise CheckpointError(
            f"state {key!r} is a {type(data).__name__}: give its local piece as a TensorShard"
        )
    if data.layout is not torch.strided or data.is_meta or data.is_quantized:
        raise CheckpointError(
            f"state {key!r} is {data.layout}, {data.dtype} on {data.device}: only dense, "
            "unquantised tensors with data can be stored"
        )
    if data.is_conj() or data.is_neg():
        raise CheckpointError(f"state {key!r} is a lazy conjugate: use its .resolve_conj()")


def check_readable(data: Tensor, key: str) -> None:
    """Refuse a shard whose values are to be read by rows but has none, or has values already."""
    if not data.is_meta or not data.dim():
        raise CheckpointError(
            f"shard {key!r} has read_rows and {data.dtype} {list(data.shape)} on {data.device}: "
            "its data must be on meta and have a dimension"
        )
