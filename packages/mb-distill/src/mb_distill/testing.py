# SPDX-License-Identifier: Apache-2.0
"""A kit that checks any distillation loss against what ``DistillLoss`` promises.

Call ``check_loss(my_loss)`` in a test; it raises AssertionError naming the broken promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mb_distill.interfaces import DistillLoss

TOKENS, CLASSES = 7, 11


def check_loss(loss: DistillLoss, *, device: str = "cpu", seed: int = 0) -> None:
    """Check every promise of ``DistillLoss`` on small random float64 logits.

    Args:
        loss: What to check.
        device: Where.
        seed: Of the random logits.

    Raises:
        AssertionError: If a promise is broken; says which.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (TOKENS, CLASSES)
    student = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    check_zero_at_equality(loss, teacher)
    check_invariances(loss, student, teacher)
    check_sums(loss, student, teacher)
    check_gradient(loss, student, teacher)


def check_zero_at_equality(loss: DistillLoss, teacher: Tensor) -> None:
    """Check that the loss and its gradient are zero where student and teacher agree."""
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher).loss_sum
    _expect(abs(value.item()) < 1e-9, f"the loss of equal logits is {value.item()}, not 0")
    (grad,) = torch.autograd.grad(value, student)
    _expect(grad.abs().max().item() < 1e-9, "the gradient at equal logits is not 0")


def check_invariances(loss: DistillLoss, student: Tensor, teacher: Tensor) -> None:
    """Check that each token's loss is positive and blind to a constant added to its logits."""
    shift = torch.linspace(-3, 3, len(student), dtype=student.dtype, device=student.device)[:, None]
    for i in range(len(student)):
        one = loss(student[i : i + 1], teacher[i : i + 1]).loss_sum.item()
        _expect(one > 0, f"the loss of unequal logits is {one}, not positive")
    value = loss(student, teacher).loss_sum
    for name, moved in (
        ("student", loss(student + shift, teacher)),
        ("teacher", loss(student, teacher + shift)),
    ):
        same = torch.allclose(moved.loss_sum, value, rtol=1e-9, atol=0)
        _expect(same, f"a constant added to the {name}'s logits changes the loss")


def check_sums(loss: DistillLoss, student: Tensor, teacher: Tensor) -> None:
    """Check that parts add up, shapes do not matter, and masked tokens have no influence."""
    whole = loss(student, teacher)
    _expect(int(whole.num_tokens) == len(student), "num_tokens is not the number of tokens")
    _expect(not whole.num_tokens.is_floating_point(), "num_tokens is not an integer tensor")
    parts = [loss(student[i : i + 3], teacher[i : i + 3]) for i in range(0, len(student), 3)]
    total = sum(float(part.loss_sum) for part in parts)
    _expect(abs(total - whole.loss_sum.item()) < 1e-9, "the sums of the parts do not add up")
    folded = loss(student[:6].view(2, 3, -1), teacher[:6].view(2, 3, -1)).loss_sum
    same = torch.allclose(folded, loss(student[:6], teacher[:6]).loss_sum, rtol=1e-12)
    _expect(same, "two batch dimensions give another loss than one")
    mask = torch.arange(len(student), device=student.device) % 2 == 0
    masked = loss(student, teacher, mask=mask)
    kept = loss(student[mask], teacher[mask])
    _expect(int(masked.num_tokens) == int(mask.sum()), "num_tokens counts masked tokens")
    same = torch.allclose(masked.loss_sum, kept.loss_sum, rtol=1e-12)
    _expect(same, "masked tokens change the loss")


def check_gradient(loss: DistillLoss, student: Tensor, teacher: Tensor) -> None:
    """Check the student's gradient by finite differences, and that the teacher gets none."""
    student = student.clone().requires_grad_()
    teacher = teacher.clone().requires_grad_()
    mask = torch.arange(len(student), device=student.device) != 1
    (grad,) = torch.autograd.grad(loss(student, teacher, mask=mask).loss_sum * 2, student)
    _expect(not grad[1].any(), "a masked token has a gradient")
    step = 1e-5
    logits = student.detach()
    for i, j in ((0, 0), (2, 5), (len(student) - 1, student.shape[-1] - 1)):
        nudge = torch.zeros_like(logits)
        nudge[i, j] = step
        up, down = (
            loss(logits + sign * nudge, teacher.detach(), mask=mask).loss_sum for sign in (1, -1)
        )
        slope = float((up - down) / step)
        close = abs(slope - grad[i, j].item()) < 1e-6 * max(1.0, abs(slope))
        _expect(close, f"gradient[{i},{j}] is {grad[i, j].item()}, finite differences give {slope}")
    torch.autograd.backward(loss(student, teacher).loss_sum)
    _expect(teacher.grad is None or not teacher.grad.any(), "a gradient reaches the teacher")


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
