# SPDX-License-Identifier: Apache-2.0
"""The linears that end a branch, where a model does more to its output than others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mb_engine.model.linears import RowLinear
from mb_engine.model.norms import norm_class

if TYPE_CHECKING:
    from torch import Tensor


class BranchLinear(RowLinear):
    """A ``RowLinear`` whose output is normalized where ``normalize_branch_outputs`` says so.

    The norm is a part of the linear, so that whatever way a layer takes (recomputation, overlap)
    it is applied between the product and the residual sum.

    Source: Gemma 2, arXiv:2408.00118, section 2 (post-norm and pre-norm).
    """

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``RowParallelLinear``."""
        super().__init__(*args, config=config, **kwargs)
        self.post_layernorm: Any = None
        if config.normalize_branch_outputs:
            norm = norm_class(config.normalization)
            self.post_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the bias where the caller is to add it.

        Args:
            input_: ``[..., I/tp]``.
        """
        output, bias = super().forward(input_)
        if self.post_layernorm is None:
            return output, bias
        if bias is not None:
            output = output + bias
        return self.post_layernorm(output), None


class AttentionOutput(BranchLinear):
    """The output projection of attention, with a bias where ``attention_output_bias`` says so."""

    def __init__(self, *args: Any, config: Any, bias: bool, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``RowParallelLinear``."""
        with_bias = bias or config.attention_output_bias
        super().__init__(*args, config=config, bias=with_bias, **kwargs)
