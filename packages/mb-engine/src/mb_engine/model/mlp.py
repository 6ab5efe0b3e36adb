# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's dense MLP without the operations that do nothing in the usual case."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch.nn import functional

from mb_engine.model.branch_linears import BranchLinear
from mb_engine.model.linears import ColumnLinear, RowLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the approximation of gelu by tanh.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.
    """
    return functional.gelu(x, approximate="tanh")


def gated(inner: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``activation(gate) * up`` for *inner* of gate and up side by side, half as wide."""
    gate, up = inner.chunk(2, dim=-1)
    return activation(gate) * up


class TorchMLP(MLP):  # type: ignore[misc]
    """``fc2(activation(fc1(x)))``, gated or not, for dense layers.

    Same modules, parameters and result as ``MLP``, which adds ``glu_linear_offset`` to the gate's
    other half even where it is 0: one more pass over the widest activation, forward and backward.

    Source: Shazeer 2020, arXiv:2002.05202, section 2.
    """

    def __init__(
        self, config: Any, submodules: Any = None, *, tp_group: Any = None, **kwargs: Any
    ) -> None:
        """Take what megatron-core gives to ``MLP``; this package's linears if no submodules."""
        last = BranchLinear if config.normalize_branch_outputs else RowLinear
        parts = submodules or MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=last)
        kwargs.setdefault("ffn_hidden_size", config.ffn_hidden_size)
        super().__init__(config, parts, tp_group=tp_group, **kwargs)
        self.activation_of = gated
        self.is_usual = (
            not config.use_te_activation_func
            and not config.bias_activation_fusion
            and not getattr(config, "activation_func_clamp_value", None)
            and not getattr(config, "glu_linear_offset", 0.0)
        )

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output ``[S, B, H]`` and the bias that the caller is to add, or None.

        Args:
            hidden_states: ``[S, B, H]``; ``[S/tp, B, H]`` under sequence parallelism.
            per_token_scale: As ``MLP`` takes it.
            **kwargs: As ``MLP`` takes them.
        """
        if not self.is_usual or per_token_scale is not None:
            return super().forward(hidden_states, per_token_scale, **kwargs)  # type: ignore[no-any-return]
        inner, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            inner = inner + bias
        if self.config.gated_linear_unit:
            inner = self.activation_of(inner, self.activation_func)
        else:
            inner = self.activation_func(inner)
        output, bias = self.linear_fc2(inner)
        return output, bias
