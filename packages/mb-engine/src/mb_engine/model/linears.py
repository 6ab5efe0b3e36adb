# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's split linears, with nothing in the way where one rank holds the whole matrix.

Megatron-core runs every linear through autograd functions that gather, scatter and reduce. In a
group of one rank these do nothing, but each still costs a call into Python forward and backward:
about half of what a small linear costs on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """``x @ weight.T + bias`` with the rows of ``weight`` split over tensor-parallel ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``ColumnParallelLinear``."""
        super().__init__(*args, **kwargs)
        self.is_whole = _is_whole(self)

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the product, and the bias where the caller is to add it.

        Args:
            input_: ``[..., I]``; ``[S/tp, B, I]`` under sequence parallelism.
            weight: In place of this module's own.
            runtime_gather_output: In place of ``gather_output``; nothing to gather on one rank.
        """
        if not self.is_whole:
            return super().forward(input_, weight, runtime_gather_output)  # type: ignore[no-any-return]
        matrix = self.weight if weight is None else weight
        if self.skip_bias_add:
            return functional.linear(input_, matrix), self.bias
        return functional.linear(input_, matrix, self.bias), None


class CappedColumnLinear(ColumnLinear):
    """``cap * tanh((x @ weight.T) / cap)``: logits that are bent to within a cap.

    Source: Gemma 2, arXiv:2408.00118, section 2.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the bent product; there is no bias to add.

        Args:
            input_: As :meth:`ColumnLinear.forward`.
            weight: As :meth:`ColumnLinear.forward`.
            runtime_gather_output: As :meth:`ColumnLinear.forward`.
        """
        logits, bias = super().forward(input_, weight, runtime_gather_output)
        cap = self.config.final_logit_softcapping
        return (logits / cap).tanh() * cap, bias


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """``x @ weight.T + bias`` with the columns of ``weight`` split over tensor-parallel ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``RowParallelLinear``."""
        super().__init__(*args, **kwargs)
        self.is_whole = _is_whole(self)
        if self.bias is not None and self.is_expert:
            # Its tokens come from all ranks, and so does its gradient; marked, it would be added
            # up once more over tensor-parallel ranks.
            self.bias.sequence_parallel = False
            # Tensor-parallel ranks have different experts; unmarked, the norm of the gradients
            # would count those of one rank alone.
            self.bias.tensor_model_parallel = True

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the product, and the bias where the caller is to add it.

        Args:
            input_: ``[..., I/tp]``.
        """
        if not self.is_whole:
            return super().forward(input_)  # type: ignore[no-any-return]
        if self.skip_bias_add:
            return functional.linear(input_, self.weight), self.bias
        return functional.linear(input_, self.weight, self.bias), None


def _is_whole(linear: Any) -> bool:
    """Return whether there is nothing to do but multiply."""
    config = linear.config
    return (
        linear.tp_group.size() == 1
        and not config.gradient_accumulation_fusion
        and not config.defer_embedding_wgrad_compute
        and not config.cpu_offloading
    )
