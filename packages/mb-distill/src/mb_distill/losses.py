# SPDX-License-Identifier: Apache-2.0
"""Distillation losses on logits.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2. The soft targets are
``q = softmax(t / T)`` and ``p = softmax(s / T)``; gradients of the loss on soft targets scale as
``1 / T**2``, so it is multiplied by ``T**2``. Forward KL is ``KL(q || p) = sum_v q (log q - log p)``,
the cross-entropy of that paper less the entropy of the teacher, which has no gradient.

Shape suffixes: N = tokens, V = vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from mb_config.records import LossTerms
from torch.autograd.function import once_differentiable

from mb_distill.errors import DistillError

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk: int = 1024,
) -> Tensor:
    """Return ``T**2 * KL(softmax(teacher / T) || softmax(student / T))``.

    Softmax and sums are in float32, in float64 if an argument is. Beyond its arguments, the result
    and the gradient, the computation holds a few ``[chunk, V]`` buffers and keeps nothing for the
    backward pass, which computes the two softmaxes again.

    Args:
        student_logits: ``[..., V]``, any float dtype; the gradient has the same dtype. An entry may
            be ``-inf`` where the teacher's is too, as for padding of the vocabulary.
        teacher_logits: ``[..., V]``, any float dtype; a constant, no gradient reaches it.
        temperature: ``T`` above, positive.
        mask: ``[...]``, True or non-zero where a token counts; None for all. What stands in
            other tokens, nan included, has no influence.
        reduction: ``"mean"`` over the counted tokens (0 if there is none), ``"sum"``, or
            ``"none"`` for one value a token, 0 where *mask* is.
        chunk: Tokens worked on at a time.

    Returns:
        0-d, or ``[...]`` for ``"none"``; float32 or float64; nats times ``T**2``.

    Raises:
        DistillError: If shapes differ, or *temperature*, *reduction* or *chunk* are out of range.
    """
    check_settings(temperature=temperature, chunk=chunk)
    if reduction not in {"mean", "sum", "none"}:
        raise DistillError(f"reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
    check_shapes("student_logits", student_logits, "teacher_logits", teacher_logits, mask)
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise DistillError(
            f"teacher_logits has {teacher_logits.shape[-1]} classes and student_logits "
            f"{student_logits.shape[-1]}: both must be over one vocabulary; cut off its padding"
        )
    counted_N = counted(student_logits, mask)
    loss_N: Tensor = _ForwardKL.apply(  # type: ignore[no-untyped-call]
        student_logits.flatten(0, -2), teacher_logits.flatten(0, -2), counted_N, temperature, chunk
    )
    if reduction == "none":
        return loss_N.view(student_logits.shape[:-1])
    if reduction == "sum":
        return loss_N.sum()
    return loss_N.sum() / counted_N.sum().clamp(min=1)


def forward_kl_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk: int = 1024,
) -> LossTerms:
    """Return what ``forward_kl`` computes as a sum over tokens and their number.

    Sums of micro-batches and of data-parallel ranks add up; means of means do not.
    """
    loss_sum = forward_kl(
        student_logits,
        teacher_logits,
        temperature=temperature,
        mask=mask,
        reduction="sum",
        chunk=chunk,
    )
    return LossTerms(loss_sum=loss_sum, num_tokens=counted(student_logits, mask).sum())


class _ForwardKL(torch.autograd.Function):
    """One loss a token, ``[N]``; the backward pass recomputes instead of storing ``[N, V]``."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any, s_NV: Tensor, t_NV: Tensor, counted_N: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(s_NV, t_NV, counted_N)
        ctx.settings = temperature, chunk
        loss_N = torch.empty(len(s_NV), dtype=working_dtype(s_NV, t_NV), device=s_NV.device)
        for at in (slice(i, i + chunk) for i in range(0, len(s_NV), chunk)):
            loss_N[at] = kl_and_gradient(s_NV[at], t_NV[at], counted_N[at], temperature)[0]
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        s_NV, t_NV, counted_N = ctx.saved_tensors
        temperature, chunk = ctx.settings
        grad_NV = torch.empty_like(s_NV)
        for at in (slice(i, i + chunk) for i in range(0, len(s_NV), chunk)):
            d_NV = kl_and_gradient(s_NV[at], t_NV[at], counted_N[at], temperature)[1]
            grad_NV[at] = d_NV.mul_(grad_N[at, None])
        return grad_NV, None, None, None, None


def kl_and_gradient(
    s_NV: Tensor, t_NV: Tensor, counted_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``T**2 KL(q || p)`` of each token and its gradient with respect to the student.

    The gradient is ``T (p - q)``: the softmax gives ``(p - q) / T``, times ``T**2``.

    Args:
        s_NV: ``[N, V]`` student logits.
        t_NV: ``[N, V]`` teacher logits.
        counted_N: ``[N]`` bool; both results are 0 elsewhere.
        temperature: T.

    Returns:
        ``[N]`` and ``[N, V]`` in float32 or float64.
    """
    dtype = working_dtype(s_NV, t_NV)
    log_p_NV = torch.log_softmax(s_NV.to(dtype) / temperature, dim=-1)
    log_q_NV = torch.log_softmax(t_NV.to(dtype) / temperature, dim=-1)
    q_NV = log_q_NV.exp()
    # q log q -> 0 as q -> 0, also where both logits are -inf
    kl_NV = log_q_NV.sub_(log_p_NV).mul_(q_NV).masked_fill_(q_NV == 0, 0.0)
    kl_N = kl_NV.sum(dim=-1).mul_(temperature**2).masked_fill_(~counted_N, 0.0)
    grad_NV = log_p_NV.exp_().sub_(q_NV).mul_(temperature)
    return kl_N, grad_NV.masked_fill_(~counted_N[:, None], 0.0)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if one of the tensors has it, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``[N]`` bool, True where a token of *values* ``[..., X]`` counts."""
    if mask is None:
        return torch.ones(values.shape[:-1].numel(), dtype=torch.bool, device=values.device)
    return (mask != 0).flatten()


def check_settings(*, temperature: float, chunk: int) -> None:
    """Raise DistillError if a number is out of range."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise DistillError(f"temperature={temperature}: must be positive and finite")
    if chunk < 1:
        raise DistillError(f"chunk={chunk}: must be at least 1 token")


def check_shapes(
    name: str, values: Tensor, other_name: str, other: Tensor, mask: Tensor | None
) -> None:
    """Raise DistillError if two tensors and a mask are not about the same tokens."""
    if values.ndim < 2:
        raise DistillError(f"{name} has shape {list(values.shape)}: must be [tokens..., features]")
    if values.shape[:-1] != other.shape[:-1]:
        raise DistillError(
            f"{other_name} has shape {list(other.shape)} and {name} {list(values.shape)}: "
            "all dimensions but the last must be equal"
        )
    if mask is not None and mask.shape != values.shape[:-1]:
        raise DistillError(
            f"mask has shape {list(mask.shape)}: must be {list(values.shape[:-1])}, one a token"
        )
