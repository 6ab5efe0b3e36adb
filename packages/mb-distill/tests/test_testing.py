# SPDX-License-Identifier: Apache-2.0
"""The kit catches what it promises to catch."""

from __future__ import annotations

import pytest
import torch
from mb_config.records import LossTerms
from mb_distill import forward_kl_terms
from mb_distill.testing import check_loss


def terms(value, student, mask):
    count = student[..., 0].numel() if mask is None else mask.sum()
    return LossTerms(loss_sum=value, num_tokens=torch.as_tensor(count))


def reversed_sign(student, teacher, *, mask=None):
    good = forward_kl_terms(student, teacher, mask=mask)
    return LossTerms(loss_sum=-good.loss_sum, num_tokens=good.num_tokens)


def mean_instead_of_sum(student, teacher, *, mask=None):
    good = forward_kl_terms(student, teacher, mask=mask)
    return LossTerms(loss_sum=good.loss, num_tokens=good.num_tokens)


def blind_to_the_mask(student, teacher, *, mask=None):
    good = forward_kl_terms(student, teacher)
    return terms(good.loss_sum, student, mask)


def squared_difference(student, teacher, *, mask=None):
    keep = torch.ones_like(student[..., 0]) if mask is None else mask
    value = ((student - teacher.detach()) ** 2 * keep[..., None]).sum()
    return terms(value, student, mask)


def cross_entropy(student, teacher, *, mask=None):
    value = -(teacher.softmax(-1) * student.log_softmax(-1)).sum()
    return terms(value, student, mask)


def trains_the_teacher(student, teacher, *, mask=None):
    keep = torch.ones_like(student[..., 0]) if mask is None else mask
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    value = ((log_q.exp() * (log_q - log_p)).sum(-1) * keep).sum()
    return terms(value, student, mask)


class HalfTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def wrong_gradient(student, teacher, *, mask=None):
    return forward_kl_terms(HalfTheGradient.apply(student), teacher, mask=mask)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (reversed_sign, "not positive"),
        (mean_instead_of_sum, "do not add up"),
        (blind_to_the_mask, "masked tokens change the loss"),
        (squared_difference, "a constant added to the student's logits"),
        (cross_entropy, "equal logits is .*, not 0"),
        (trains_the_teacher, "a gradient reaches the teacher"),
        (wrong_gradient, "finite differences give"),
    ],
)
def test_a_broken_loss_is_caught(loss, message):
    with pytest.raises(AssertionError, match=message):
        check_loss(loss)


def test_a_right_loss_passes():
    check_loss(forward_kl_terms, seed=5)
