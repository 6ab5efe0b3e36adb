# SPDX-License-Identifier: Apache-2.0
"""Forward KL on logits against the textbook formula in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mb_config.errors import UserError
from mb_distill import DistillError, forward_kl, forward_kl_terms
from mb_distill.testing import check_loss


def textbook(student, teacher, temperature, mask=None):
    """KL(q || p) T^2 with probabilities written out, one value a token, float64."""
    p = torch.exp(student.double() / temperature)
    q = torch.exp(teacher.double() / temperature)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    kl = temperature**2 * (q * torch.log(q / p)).sum(-1)
    return kl if mask is None else kl[mask]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, 37, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.fixture
def mask():
    return torch.rand(5, 6, generator=torch.Generator().manual_seed(2)) < 0.7


class TestValue:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    @pytest.mark.parametrize("chunk", [1, 7, 1024])
    def test_equals_the_formula(self, logits, mask, temperature, chunk):
        want = textbook(*logits, temperature, mask)
        args = {"temperature": temperature, "mask": mask, "chunk": chunk}
        torch.testing.assert_close(forward_kl(*logits, **args), want.mean(), rtol=1e-12, atol=0)
        total = forward_kl(*logits, **args, reduction="sum")
        torch.testing.assert_close(total, want.sum(), rtol=1e-12, atol=0)
        each = forward_kl(*logits, **args, reduction="none")
        assert each.shape == mask.shape
        torch.testing.assert_close(each[mask], want, rtol=1e-11, atol=1e-14)
        assert not each[~mask].any()

    def test_equals_the_kl_divergence_of_torch(self, logits):
        student, teacher = logits
        want = torch.nn.functional.kl_div(
            student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
        )
        torch.testing.assert_close(forward_kl(student, teacher, reduction="sum"), want)

    def test_is_the_teachers_cross_entropy_less_its_entropy(self, logits):
        student, teacher = logits
        q = teacher.softmax(-1)
        cross_entropy = torch.nn.functional.cross_entropy(student.flatten(0, 1), q.flatten(0, 1))
        entropy = torch.distributions.Categorical(q).entropy().mean()
        torch.testing.assert_close(forward_kl(student, teacher), cross_entropy - entropy)

    def test_at_high_temperature_tends_to_half_the_squared_difference_of_logits(self, logits):
        # Hinton et al. eq. 4: for centred logits the gradient tends to (s - t) / V
        student, teacher = (x - x.mean(-1, keepdim=True) for x in logits)
        limit = ((student - teacher) ** 2).sum(-1) / (2 * student.shape[-1])
        loss = forward_kl(student, teacher, temperature=1e4, reduction="none")
        torch.testing.assert_close(loss, limit, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_is_summed_in_float32_for_narrow_types(self, logits, dtype):
        student, teacher = (x.to(dtype) for x in logits)
        loss = forward_kl(student, teacher, temperature=2.0)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), textbook(student, teacher, 2.0).mean())

    @pytest.mark.parametrize("values", [1e4, 1e30])
    def test_survives_huge_logits(self, values):
        student = torch.tensor([[values, 0.0]])
        assert forward_kl(student, student.clone()) == 0
        assert forward_kl(student.flip(-1), student) == pytest.approx(values, rel=1e-6)

    def test_padding_of_the_vocabulary_adds_nothing(self, logits):
        padded = [torch.nn.functional.pad(x, (0, 3), value=-torch.inf) for x in logits]
        padded[0].requires_grad_()
        loss = forward_kl(*padded)
        torch.testing.assert_close(loss, forward_kl(*logits))
        loss.backward()
        assert not padded[0].grad[..., -3:].any()
        assert padded[0].grad.isfinite().all()

    def test_is_infinite_where_the_student_rules_out_what_the_teacher_does_not(self):
        assert forward_kl(torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 2)) == torch.inf

    def test_masked_tokens_have_no_influence_even_as_nan(self, logits, mask):
        student, teacher = (x.clone() for x in logits)
        student[~mask] = torch.nan
        teacher[~mask] = torch.inf
        student.requires_grad_()
        loss = forward_kl(student, teacher, mask=mask.float())
        torch.testing.assert_close(loss, textbook(*logits, 1.0, mask).mean())
        loss.backward()
        assert student.grad.isfinite().all()
        assert not student.grad[~mask].any()

    def test_a_batch_without_a_counted_token_costs_nothing(self, logits):
        student = logits[0].requires_grad_()
        loss = forward_kl(student, logits[1], mask=torch.zeros(5, 6))
        loss.backward()
        assert loss == 0
        assert not student.grad.any()


class TestGradient:
    @pytest.mark.parametrize("temperature", [0.7, 3.0])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_equals_that_of_the_formula(self, logits, mask, temperature, reduction):
        student, teacher = logits
        ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
        weight = torch.linspace(-1, 2, 30, dtype=torch.float64).view(5, 6)
        kl = textbook(theirs, teacher, temperature) * mask
        args = {"temperature": temperature, "mask": mask, "reduction": reduction, "chunk": 4}
        loss = forward_kl(ours, teacher, **args)
        if reduction == "none":
            (loss * weight).sum().backward()
            (kl * weight).sum().backward()
        else:
            (3 * loss).backward()
            (3 * kl.sum() / (mask.sum() if reduction == "mean" else 1)).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)

    def test_passes_gradcheck(self, logits):
        student = logits[0][:2, :3, :5].clone().requires_grad_()
        teacher = logits[1][:2, :3, :5]
        loss = functools.partial(
            forward_kl, teacher_logits=teacher, temperature=2.0, reduction="none", chunk=4
        )
        assert torch.autograd.gradcheck(loss, (student,))

    def test_has_the_dtype_of_the_student(self, logits):
        student, teacher = (x.bfloat16() for x in logits)
        student.requires_grad_()
        forward_kl(student, teacher).backward()
        assert student.grad.dtype == torch.bfloat16
        wide = student.detach().double().requires_grad_()
        textbook(wide, teacher, 1.0).mean().backward()
        torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-2, atol=1e-6)

    def test_a_second_derivative_is_refused(self, logits):
        student = logits[0].requires_grad_()
        loss = forward_kl(student, logits[1]) ** 2
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


class TestTerms:
    def test_sums_of_any_split_add_up_to_the_mean(self, logits, mask):
        whole = forward_kl(*logits, temperature=2.0, mask=mask)
        parts = [
            forward_kl_terms(s, t, temperature=2.0, mask=m)
            for s, t, m in zip(*(x.split([1, 4]) for x in (*logits, mask)), strict=True)
        ]
        total = sum(p.loss_sum for p in parts) / sum(p.num_tokens for p in parts)
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_keeps_the_promises_of_the_interface(self, temperature):
        check_loss(functools.partial(forward_kl_terms, temperature=temperature, chunk=3))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    classes=st.integers(1, 9),
    chunk=st.integers(1, 11),
    temperature=st.floats(0.1, 20),
    seed=st.integers(0, 1000),
)
def test_any_size_and_chunk_give_the_formula(tokens, classes, chunk, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, tokens, classes, generator=generator, dtype=torch.float64)
    loss = forward_kl(student, teacher, temperature=temperature, chunk=chunk)
    want = textbook(student, teacher, temperature).mean()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    assert loss >= -1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0\.0: must be positive and finite"),
        ({"temperature": float("nan")}, "temperature=nan: must be positive"),
        ({"chunk": 0}, "chunk=0: must be at least 1"),
        ({"reduction": "average"}, "reduction='average': must be 'mean', 'sum' or 'none'"),
        ({"mask": torch.ones(4)}, r"mask has shape \[4\]: must be \[3\]"),
        ({"teacher_logits": torch.ones(3, 4)}, "has 4 classes and student_logits 5"),
        ({"teacher_logits": torch.ones(2, 5)}, r"shape \[2, 5\] and student_logits \[3, 5\]"),
        ({"student_logits": torch.ones(5)}, r"student_logits has shape \[5\]: must be"),
    ],
)
def test_misfits_are_named(change, message):
    args = {"student_logits": torch.ones(3, 5), "teacher_logits": torch.ones(3, 5)} | change
    with pytest.raises(DistillError, match=message) as caught:
        forward_kl(**args)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
