# SPDX-License-Identifier: Apache-2.0
"""Forward KL from hidden states, without logits of all tokens at once.

Source of the loss: see ``losses``. That the gradient of a linear layer and a scalar loss on top of
it can be computed chunk by chunk in the forward pass is own working: with logits ``s = h W^T`` and
``g = dL/ds``, ``dL/dh = g W`` and ``dL/dW = g^T h``, a sum over tokens.

Shape suffixes: N = tokens, H = student width, K = teacher width, V = vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from mb_config.records import LossTerms
from torch.autograd.function import once_differentiable

from mb_distill.errors import DistillError
from mb_distill.losses import (
    check_settings,
    check_shapes,
    counted,
    kl_and_gradient,
    working_dtype,
)

if TYPE_CHECKING:
    from torch import Tensor


def fused_linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int = 1024,
) -> Tensor:
    """Return the forward KL of ``forward_kl`` between two heads, never holding ``[tokens, V]``.

    Logits exist for *chunk* tokens at a time, in the dtype of the arguments (of autocast where it
    is on); softmax and sums are in float32, in float64 if the student's are. The gradients are
    computed along with the loss, if asked for, and kept: as much memory as *student_hidden*, and as
    *student_head* in float32.

    Args:
        student_hidden: ``[..., H]`` what goes into the student's output layer; gets a gradient.
        student_head: ``[V, H]`` weight of that layer; gets a gradient.
        teacher_hidden: ``[..., K]`` for the same tokens; a constant.
        teacher_head: ``[V, K]``; a constant.
        temperature: T, positive.
        mask: ``[...]``, True or non-zero where a token counts; None for all.
        reduction: ``"mean"`` over the counted tokens (0 if there is none), or ``"sum"``.
        chunk: Tokens worked on at a time; peak memory is about ``6 * chunk * V`` floats.

    Returns:
        0-d float32 or float64; nats times ``T**2``.

    Raises:
        DistillError: If shapes or dtypes do not fit, or a setting is out of range.
    """
    if reduction not in {"mean", "sum"}:
        raise DistillError(f"reduction={reduction!r}: must be 'mean' or 'sum'")
    terms = fused_linear_kl_terms(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        temperature=temperature,
        mask=mask,
        chunk=chunk,
    )
    if reduction == "sum":
        return terms.loss_sum
    return terms.loss_sum / terms.num_tokens.clamp(min=1)


def fused_linear_kl_terms(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk: int = 1024,
) -> LossTerms:
    """Return what ``fused_linear_kl`` computes as a sum over tokens and their number."""
    check_settings(temperature=temperature, chunk=chunk)
    check_shapes("student_hidden", student_hidden, "teacher_hidden", teacher_hidden, mask)
    _check_heads(student_hidden, student_head, teacher_hidden, teacher_head)
    tensors = [
        _autocast(x.flatten(0, -2) if x.ndim > 2 else x)
        for x in (student_hidden, student_head, teacher_hidden, teacher_head)
    ]
    for name, (hidden, head) in {"student": tensors[:2], "teacher": tensors[2:]}.items():
        if hidden.dtype != head.dtype:
            raise DistillError(
                f"{name}_hidden is {hidden.dtype} and {name}_head {head.dtype}: must be equal; "
                "cast one, or call within torch.autocast"
            )
    counted_N = counted(student_hidden, mask)
    loss_sum: Tensor = _FusedLinearKL.apply(  # type: ignore[no-untyped-call]
        *tensors, counted_N, temperature, chunk
    )
    return LossTerms(loss_sum=loss_sum, num_tokens=counted_N.sum())


class _FusedLinearKL(torch.autograd.Function):
    """The loss summed over tokens, with the gradients of the student computed in the forward."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        h_NH: Tensor,
        head_VH: Tensor,
        teacher_NK: Tensor,
        teacher_VK: Tensor,
        counted_N: Tensor,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        dtype = working_dtype(h_NH, head_VH)
        want_h, want_head = ctx.needs_input_grad[:2]
        grad_NH = torch.empty_like(h_NH) if want_h else None
        grad_VH = torch.zeros_like(head_VH, dtype=dtype) if want_head else None
        loss = torch.zeros((), dtype=dtype, device=h_NH.device)
        with torch.autocast(h_NH.device.type, enabled=False):
            for at in (slice(i, i + chunk) for i in range(0, len(h_NH), chunk)):
                s_CV = h_NH[at] @ head_VH.T
                t_CV = teacher_NK[at] @ teacher_VK.T
                loss_C, d_CV = kl_and_gradient(s_CV, t_CV, counted_N[at], temperature)
                loss += loss_C.sum()
                d_CV = d_CV.to(h_NH.dtype)
                if grad_NH is not None:
                    grad_NH[at] = d_CV @ head_VH
                if grad_VH is not None:
                    grad_VH += d_CV.T @ h_NH[at]
        ctx.save_for_backward(grad_NH, grad_VH)
        ctx.head_dtype = head_VH.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_NH, grad_VH = ctx.saved_tensors
        grad_h = None if grad_NH is None else grad_NH * grad.to(grad_NH.dtype)
        grad_head = None if grad_VH is None else (grad_VH * grad).to(ctx.head_dtype)
        return grad_h, grad_head, None, None, None, None, None


def _autocast(x: Tensor) -> Tensor:
    """Return *x* in the dtype that a matrix product would have under autocast."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _check_heads(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> None:
    """Raise DistillError if a head does not fit its hidden states or the other head."""
    pairs = {
        "student": (student_hidden, student_head),
        "teacher": (teacher_hidden, teacher_head),
    }
    for name, (hidden, head) in pairs.items():
        if head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
            raise DistillError(
                f"{name}_head has shape {list(head.shape)}: must be [V, {hidden.shape[-1]}], "
                f"the width of {name}_hidden last"
            )
    if student_head.shape[0] != teacher_head.shape[0]:
        raise DistillError(
            f"teacher_head has {teacher_head.shape[0]} classes and student_head "
            f"{student_head.shape[0]}: both must be over one vocabulary; cut off its padding"
        )
