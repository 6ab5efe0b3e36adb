# SPDX-License-Identifier: Apache-2.0
"""Adapters beside ``torch.nn.Linear``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mb_peft.errors import PeftError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PARALLEL = ("megatron.", "transformer_engine.")


@frozen
class TorchLinears:
    """Builds plain adapters beside ``nn.Linear`` and its subclasses.

    Attributes:
        dtype: Of the adapters' weights and products; None for that of the base. The sum has the
            dtype of the base's output either way.
    """

    dtype: torch.dtype | None = None

    def pair(self, base: nn.Module, *, rank: int) -> tuple[nn.Module, nn.Module] | None:
        """See ``LinearFactory.pair``.

        Raises:
            PeftError: For linears of megatron-core and Transformer Engine, for the output
                projection of ``nn.MultiheadAttention`` and for weights that are not plain floats.
        """
        kind = type(base)
        if kind.__module__.startswith(PARALLEL) and kind.__name__.endswith("Linear"):
            raise PeftError(
                f"is a {kind.__name__}: adapters for parallel linears of megatron-core and "
                "Transformer Engine are not supported yet; leave 'peft' unset to train the whole "
                "model, or pass inject(factory=...) a LinearFactory that knows this class"
            )
        if not isinstance(base, nn.Linear):
            return None
        if isinstance(base, NonDynamicallyQuantizableLinear):
            raise PeftError(
                "is the output projection of nn.MultiheadAttention, which reads its weight past "
                "any adapter; leave it out with exclude_modules"
            )
        weight = base.weight
        if not weight.is_floating_point() or weight.shape != (base.out_features, base.in_features):
            raise PeftError(
                f"holds a packed {weight.dtype} weight of shape {list(weight.shape)}: only "
                "unquantized linears can be adapted; leave it out with exclude_modules"
            )
        options: dict[str, Any] = {
            "bias": False,
            "device": weight.device,
            "dtype": self.dtype or weight.dtype,
        }
        a = nn.Linear(base.in_features, rank, **options)
        b = nn.Linear(rank, base.out_features, **options)
        return a, b

    def call(self, base: nn.Module, x: Tensor, adapter: Callable[[Tensor], Tensor]) -> Tensor:
        """See ``LinearFactory.call``."""
        y: Tensor = base(x)
        x = x if self.dtype is None else x.to(self.dtype)
        return y + adapter(x).to(y.dtype)

    def merged(self, base: nn.Module, delta: Tensor) -> Tensor:
        """See ``LinearFactory.merged``; the sum is rounded once, to the dtype of the weight."""
        weight = base.get_parameter("weight").detach()
        return (weight.to(delta.dtype) + delta).to(weight.dtype)
