# SPDX-License-Identifier: Apache-2.0
"""Forward KL from hidden states: equal to the loss on logits, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from mb_distill import DistillError, forward_kl, fused_linear_kl, fused_linear_kl_terms
from mb_distill.testing import check_loss
from torch.utils._python_dispatch import TorchDispatchMode

N, H, K, V = 23, 8, 5, 31


def textbook(h, head, teacher_h, teacher_head, temperature, mask):
    """The formula in float64, with probabilities and logits written out."""
    p = torch.exp(h @ head.T / temperature)
    q = torch.exp(teacher_h @ teacher_head.T / temperature)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    kl = temperature**2 * (q * torch.log(q / p)).sum(-1)
    return (kl * mask).sum() / mask.sum()


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(3)
    shapes = [(N, H), (V, H), (N, K), (V, K)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.fixture
def mask():
    return torch.arange(N) % 3 > 0


@pytest.mark.parametrize("chunk", [1, 4, 23, 500])
@pytest.mark.parametrize("temperature", [0.8, 2.5])
def test_loss_and_gradients_equal_the_formula(tensors, mask, chunk, temperature):
    h, head, *teacher = tensors
    ours = [x.clone().requires_grad_() for x in (h, head)]
    theirs = [x.clone().requires_grad_() for x in (h, head)]
    loss = fused_linear_kl(*ours, *teacher, temperature=temperature, mask=mask, chunk=chunk)
    want = textbook(*theirs, *teacher, temperature, mask)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    (loss * 5).backward()
    (want * 5).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


def test_passes_gradcheck(tensors, mask):
    h, head, *teacher = (x.clone() for x in tensors)

    def loss(h, head):
        return fused_linear_kl(h, head, *teacher, temperature=2.0, mask=mask, chunk=6)

    assert torch.autograd.gradcheck(loss, (h.requires_grad_(), head.requires_grad_()))


def test_equals_the_loss_on_logits_of_any_shape(tensors):
    h, head, th, teacher_head = tensors
    h, th = h[:22].view(2, 11, H), th[:22].view(2, 11, K)
    mask = torch.ones(2, 11)
    mask[0, 3] = 0
    for reduction in ("mean", "sum"):
        args = {"temperature": 3.0, "mask": mask, "reduction": reduction}
        fused = fused_linear_kl(h, head, th, teacher_head, **args)
        torch.testing.assert_close(fused, forward_kl(h @ head.T, th @ teacher_head.T, **args))


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_right_one(tensors, frozen):
    h, head, *teacher = tensors
    both = [h.clone().requires_grad_(), head.clone().requires_grad_()]
    fused_linear_kl(*both, *teacher).backward()
    one = [h.clone().requires_grad_(frozen != "hidden"), head.clone().requires_grad_()]
    one[1].requires_grad_(frozen != "head")
    fused_linear_kl(*one, *teacher).backward()
    kept = 0 if frozen == "head" else 1
    assert one[1 - kept].grad is None
    torch.testing.assert_close(one[kept].grad, both[kept].grad, rtol=0, atol=0)


def test_works_where_nothing_needs_a_gradient(tensors, mask):
    with torch.no_grad():
        loss = fused_linear_kl(*tensors, mask=mask)
    torch.testing.assert_close(loss, textbook(*tensors, 1.0, mask))


def test_bfloat16_gives_the_loss_of_the_rounded_arguments(tensors, mask):
    narrow = [x.bfloat16() for x in tensors]
    narrow[0].requires_grad_()
    narrow[1].requires_grad_()
    loss = fused_linear_kl(*narrow, mask=mask, temperature=2.0, chunk=5)
    wide = [x.detach().double() for x in narrow]
    wide[0].requires_grad_()
    wide[1].requires_grad_()
    want = textbook(*wide, 2.0, mask)
    want.backward()
    loss.backward()
    assert (loss.dtype, narrow[1].grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss.double(), want, rtol=2e-2, atol=0)
    for a, b in zip(narrow[:2], wide[:2], strict=True):
        error = (a.grad.double() - b.grad).norm() / b.grad.norm()
        assert error < 2e-2


def test_the_head_gradient_is_summed_in_float32():
    # 4,000 equal contributions of 2^-9 to a bfloat16 sum would stop growing at 1
    h = torch.ones(4000, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16)
    fused_linear_kl(h, head, h, teacher, reduction="sum", chunk=1).backward()
    want = 4000 * (torch.tensor([0.0, 1.0]).softmax(0)[1] - 0.5)
    assert head.grad[0].item() == pytest.approx(want.item(), rel=5e-3)


def test_autocast_computes_logits_in_its_dtype(tensors):
    narrow = [x.float() for x in tensors]
    narrow[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_kl(narrow[0].bfloat16(), *narrow[1:])
    loss.backward()
    assert narrow[0].grad.dtype == torch.float32
    assert loss == fused_linear_kl(*(x.bfloat16() for x in narrow))


def test_sums_of_any_split_add_up(tensors, mask):
    h, head, th, teacher_head = tensors
    whole = fused_linear_kl_terms(h, head, th, teacher_head, mask=mask)
    parts = [
        fused_linear_kl_terms(h[at], head, th[at], teacher_head, mask=mask[at])
        for at in (slice(0, 9), slice(9, None))
    ]
    torch.testing.assert_close(sum(p.loss_sum for p in parts), whole.loss_sum)
    assert sum(p.num_tokens for p in parts) == whole.num_tokens == mask.sum()


def test_keeps_the_promises_of_the_interface():
    def on_logits(student_logits, teacher_logits, *, mask=None):
        eye = torch.eye(student_logits.shape[-1], dtype=student_logits.dtype)
        args = {"temperature": 2.0, "mask": mask, "chunk": 2}
        return fused_linear_kl_terms(student_logits, eye, teacher_logits, eye, **args)

    check_loss(on_logits)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_operation_makes_logits_of_more_than_a_chunk():
    tokens, width, classes, chunk = 512, 4, 300, 16
    h = torch.randn(tokens, width, requires_grad=True)
    head = torch.randn(classes, width, requires_grad=True)
    with Largest() as largest:
        fused_linear_kl(h, head, h.detach(), head.detach() + 1, chunk=chunk).backward()
    assert largest.elements == chunk * classes
    with Largest() as largest:
        forward_kl(h @ head.T, h.detach() @ head.detach().T).backward()
    assert largest.elements == tokens * classes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_a_chunk_and_not_of_all_logits():
    # float32 logits of all tokens would be 512 MiB for each of student and teacher
    program = """
        import resource, torch
        from mb_distill import fused_linear_kl
        N, H, V, chunk = 8192, 8, 16384, 128
        h = torch.randn(N, H, requires_grad=True)
        head = torch.randn(V, H, requires_grad=True)
        fused_linear_kl(h[:4], head, h[:4].detach(), head.detach()).backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fused_linear_kl(h, head, h.detach(), 1 - head.detach(), chunk=chunk).backward()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    chunk_mib = 128 * 16384 * 4 / 2**20
    assert float(run.stdout) < 10 * chunk_mib  # 80 MiB


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, torch.ones(V, H + 1), rf"student_head has shape \[{V}, {H + 1}\]: must be \[V, {H}\]"),
        (3, torch.ones(V - 1, K), f"teacher_head has {V - 1} classes and student_head {V}"),
        (2, torch.ones(N - 1, K), rf"teacher_hidden has shape \[{N - 1}, {K}\]"),
        (1, torch.ones(V, H).bfloat16(), r"student_head torch\.bfloat16: must be equal; cast one"),
    ],
)
def test_misfits_are_named(tensors, index, value, message):
    tensors[index] = value
    with pytest.raises(DistillError, match=message):
        fused_linear_kl(*tensors)


def test_an_unknown_reduction_is_refused(tensors):
    with pytest.raises(DistillError, match="reduction='none': must be 'mean' or 'sum'"):
        fused_linear_kl(*tensors, reduction="none")
