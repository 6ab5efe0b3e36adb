# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's GPT model with the output layer and loss of the torch layer spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mb_engine.model.cross_entropy import token_cross_entropy
from mb_engine.model.linears import CappedColumnLinear, ColumnLinear
from mb_engine.model.multi_token import MultiTokenGPTModel

if TYPE_CHECKING:
    from torch import Tensor


class TorchGPTModel(MultiTokenGPTModel):
    """``GPTModel`` that computes the loss of a whole vocabulary in one place.

    Megatron-core's loss is for a vocabulary split over tensor-parallel ranks; it is used where the
    vocabulary is split, and on CUDA.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``GPTModel``."""
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer: Any = _with_weight_of(self.output_layer, self)

    def _set_attention_backend(self) -> None:
        """Leave Transformer Engine's variables alone; the torch spec reads the configuration."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the loss of every token, float32 ``[B, S]``.

        Args:
            labels: ``[B, S]``.
            logits: ``[S, B, V/tp]``; their memory is used up.
        """
        in_parts = self.output_layer.tp_group.size() > 1
        if in_parts or logits.is_cuda or self.config.cross_entropy_loss_fusion:
            return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]
        return token_cross_entropy(logits, labels.t()).t().contiguous()


def _with_weight_of(layer: Any, model: TorchGPTModel) -> ColumnLinear:
    """Return an output layer of this package with the weight of *layer*, if that has one."""
    capped = getattr(layer.config, "final_logit_softcapping", None) is not None
    replacement = (CappedColumnLinear if capped else ColumnLinear)(
        layer.input_size,
        layer.output_size,
        config=layer.config,
        init_method=layer.config.init_method,
        bias=False,
        gather_output=layer.gather_output,
        skip_weight_param_allocation=True,
        embedding_activation_buffer=model.embedding_activation_buffer,
        grad_output_buffer=model.grad_output_buffer,
        tp_group=layer.tp_group,
    )
    replacement.weight = layer.weight
    return replacement
