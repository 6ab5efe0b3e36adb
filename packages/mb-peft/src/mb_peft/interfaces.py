# SPDX-License-Identifier: Apache-2.0
"""What this package asks of others. Implementers match it by shape and import nothing from here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


class LinearFactory(Protocol):
    """Knows one kind of linear, so that an adapter never asks what it sits beside.

    ``mb_peft.testing.check_factory`` tells whether an implementation keeps the promises below.
    """

    def pair(self, base: nn.Module, *, rank: int) -> tuple[nn.Module, nn.Module] | None:
        """Return linears ``a: in -> rank`` and ``b: rank -> out`` to sit beside *base*.

        Both take and return one tensor, have no bias, their matrix as ``weight`` of shape
        ``[rank, in]`` and ``[out, rank]``, and the device of *base*; ``b(a(x))`` is laid out like
        the output of *base*.

        Returns:
            The two with values that the caller sets; None if *base* is no linear at all.

        Raises:
            PeftError: If *base* is a linear of a kind that this factory cannot adapt.
        """
        ...

    def call(self, base: nn.Module, x: Tensor, adapter: Callable[[Tensor], Tensor]) -> Any:
        """Return what *base* returns for *x*, with ``adapter(input of its matrix)`` added."""
        ...

    def merged(self, base: nn.Module, delta: Tensor) -> Tensor:
        """Return the weight of *base* plus *delta* ``[out, in]``, of its dtype and layout."""
        ...
