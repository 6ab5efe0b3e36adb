# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's transformer layer on a short way for training, and on its own for all else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


class TorchTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """Norm, self-attention and residual, then norm, MLP or experts and residual.

    Same modules, parameters and result as ``TransformerLayer``, whose forward pass also serves
    cross-attention, offloading, recomputed norms, CUDA graphs and inference.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``TransformerLayer``."""
        super().__init__(*args, **kwargs)
        config = self.config
        self.is_usual = (
            isinstance(self.cross_attention, IdentityOp)
            and not config.bias_dropout_fusion
            and not config.fp32_residual_connection
            and not self.recompute_input_layernorm
            and not self.recompute_pre_mlp_layernorm
            and not self.recompute_mlp
            and not any(_is_on(getattr(config, name, None)) for name in _UNUSUAL)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer past the questions that megatron-core asks about CUDA graphs."""
        if self.is_usual:
            return nn.Module.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Return the output ``[S, B, H]`` and the cross-attention context, which is None here.

        Args:
            hidden_states: ``[S, B, H]``; ``[S/tp, B, H]`` under sequence parallelism.
            attention_mask: Given to the core attention.
            *args: As ``TransformerLayer`` takes them.
            rotary_pos_emb: Angles ``[S, 1, 1, D]``, or None.
            packed_seq_params: How the row is packed, or None.
            **kwargs: As ``TransformerLayer`` takes them.
        """
        if not self.is_usual or args or any(value is not None for value in kwargs.values()):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        attended, bias = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        hidden_states = self._onto_residual(attended, bias, hidden_states)
        transformed, bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return self._onto_residual(transformed, bias, hidden_states), None

    def _onto_residual(self, x_SBH: Tensor, bias_H: Tensor | None, residual_SBH: Tensor) -> Tensor:
        if bias_H is not None:
            x_SBH = x_SBH + bias_H
        if self.training and self.hidden_dropout > 0.0:
            x_SBH = functional.dropout(x_SBH, self.hidden_dropout)
        return residual_SBH + x_SBH


def _is_on(value: Any) -> bool:
    return value not in {None, False, "none"}


_UNUSUAL = (
    "cpu_offloading",
    "enable_cuda_graph",
    "external_cuda_graph",
    "cuda_graph_impl",
    "fine_grained_activation_offloading",
    "fp4",
    "fp8",
    "inference_fuse_tp_communication",
)
"""Fields of ``TransformerConfig`` that send a layer through megatron-core's own forward pass."""
