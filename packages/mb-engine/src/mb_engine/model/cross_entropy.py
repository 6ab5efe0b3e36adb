# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of every token in the memory of its logits, on a CPU.

The logits are the largest tensor of a training step (tokens x vocabulary). Torch's cross-entropy
makes three more of that size; megatron-core's makes none but passes over them eight times.

Shape suffixes: S = tokens of a sequence, B = micro-batch, V = vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mb_engine.model.autograd import first_order

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = 1 << 18
"""Elements of a block of rows: 1 MiB of float32, which stays in a core's cache."""


def token_cross_entropy(logits_SBV: Tensor, labels_SB: Tensor) -> Tensor:
    """Return ``log(sum(exp(logits))) - logits[label]`` of every token, float32 ``[S, B]``.

    The memory of float32 logits is used up: they hold log-probabilities afterwards, and after the
    backward pass their gradient.

    Args:
        logits_SBV: Any float dtype, on the CPU, whose log-softmax works row by row and therefore in
            place; the whole vocabulary.
        labels_SB: int64, below V; the loss of a negative label means nothing and is to be masked.
    """
    labels_SB1 = labels_SB.clamp(min=0).unsqueeze(-1)
    losses_SB: Tensor = _TokenCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_SBV.float().contiguous(), labels_SB1
    )
    return losses_SB


class _TokenCrossEntropy(torch.autograd.Function):
    """Log-softmax in place; the gradient ``(softmax - onehot) * grad`` in place of it."""

    @staticmethod
    def forward(ctx: Any, logits_SBV: Tensor, labels_SB1: Tensor) -> Tensor:
        """Return the losses [S, B] and keep the log-probabilities."""
        log_probs = torch.log_softmax(logits_SBV, -1, out=logits_SBV)
        ctx.save_for_backward(log_probs, labels_SB1)
        return log_probs.gather(-1, labels_SB1).squeeze(-1).neg_()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the logits in their memory."""
        log_probs, labels = ctx.saved_tensors
        width = log_probs.size(-1)
        rows = log_probs.numel() // width
        flat = log_probs.view(rows, width), labels.reshape(rows, 1), grad_SB.reshape(rows, 1)
        step = max(1, _BLOCK_ELEMENTS // width)
        blocks = zip(*(torch.split(x, step) for x in flat), strict=True) if step < rows else [flat]
        minus_one = log_probs.new_full((1, 1), -1.0)
        for block, label, grad in blocks:
            block.exp_().scatter_add_(-1, label, minus_one.expand_as(label)).mul_(grad)
        return log_probs, None
