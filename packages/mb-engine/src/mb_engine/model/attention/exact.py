# SPDX-License-Identifier: Apache-2.0
"""Attention in plain matrix products, some query rows at a time: for what no fused kernel computes.

It caps scores, takes any dtype, windows and queries that are fewer than the keys, and gives the
log-sum-exp of the scores, so that partial results can be merged. The memory beyond its inputs and
outputs is bounded (:data:`_ELEMENTS` scores at a time), forward and backward.

Shape suffixes, all local to the rank: S = query tokens, T = key tokens, B = micro-batch,
N = query heads, G = key and value heads, D = width of a query and key, E = width of a value,
C = query rows at a time, X = keys that those see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mb_engine.model.autograd import first_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from mb_engine.model.attention.scoring import Scoring

_ELEMENTS = 2**24
_HALVES = (torch.float16, torch.bfloat16)


def exact_attention(q_SBND: Tensor, k_TBGD: Tensor, v_TBGE: Tensor, scoring: Scoring) -> Tensor:
    """Return softmax attention ``[S, B, N, E]``, differentiable once.

    Args:
        q_SBND: Queries.
        k_TBGD: Keys; N is a multiple of G.
        v_TBGE: Values.
        scoring: From scores to probabilities; every query must see a key.
    """
    return _Exact.apply(q_SBND, k_TBGD, v_TBGE, scoring)  # type: ignore[no-any-return, no-untyped-call]


class _Exact(torch.autograd.Function):
    """The two passes below as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any, q_SBND: Tensor, k_TBGD: Tensor, v_TBGE: Tensor, scoring: Scoring
    ) -> Tensor:
        """Attend."""
        out_SBNE, lse_BNS = exact_forward(q_SBND, k_TBGD, v_TBGE, scoring)
        ctx.save_for_backward(q_SBND, k_TBGD, v_TBGE, out_SBNE, lse_BNS)
        ctx.scoring = scoring
        return out_SBNE

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_SBNE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of queries, keys and values."""
        q, k, v, out, lse = ctx.saved_tensors
        return *exact_backward(grad_SBNE, q, k, v, out, lse, ctx.scoring), None


def exact_forward(
    q_SBND: Tensor, k_TBGD: Tensor, v_TBGE: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Return the output ``[S, B, N, E]`` and the log-sum-exp of the scores ``[B, N, S]``."""
    queries, batch, heads, _ = q_SBND.shape
    out_SBNE = q_SBND.new_empty(queries, batch, heads, v_TBGE.size(-1))
    lse_BNS = q_SBND.new_empty(batch, heads, queries, dtype=_sum_dtype(q_SBND))
    for first, end, start, stop in _spans(q_SBND, k_TBGD, scoring):
        q = _by_group(q_SBND[first:end], k_TBGD.size(2))
        scores, _ = _scores(q, k_TBGD, scoring, (first, end, start, stop), queries)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(lse).exp_().to(v_TBGE.dtype)
        out = torch.bmm(weights, _keys(v_TBGE[start:stop]))
        out_SBNE[first:end] = _by_row(out, batch, heads)
        lse_BNS[:, :, first:end] = lse.view(batch, heads, end - first)
    return out_SBNE, lse_BNS


def exact_backward(  # noqa: PLR0917 - as autograd has them
    grad_SBNE: Tensor,
    q_SBND: Tensor,
    k_TBGD: Tensor,
    v_TBGE: Tensor,
    out_SBNE: Tensor,
    lse_BNS: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    *out_SBNE* and *lse_BNS* may be those of more keys than are given here; the result is then the
    part of the gradients that goes through these keys. Source: Dao 2023, arXiv:2307.08691, alg. 2.
    """
    queries, batch, heads, _ = q_SBND.shape
    groups = k_TBGD.size(2)
    dq_SBND = torch.empty_like(q_SBND)
    dk = k_TBGD.new_zeros(batch * groups, *k_TBGD.shape[::3], dtype=_sum_dtype(q_SBND))
    dv = v_TBGE.new_zeros(batch * groups, *v_TBGE.shape[::3], dtype=_sum_dtype(q_SBND))
    delta_BNS = (grad_SBNE * out_SBNE).sum(-1, dtype=dk.dtype).permute(1, 2, 0)
    for span in _spans(q_SBND, k_TBGD, scoring):
        first, end, start, stop = span
        q, grad = (_by_group(x[first:end], groups) for x in (q_SBND, grad_SBNE))
        scores, slope = _scores(q, k_TBGD, scoring, span, queries)
        row = (batch * groups, -1, 1)
        weights = scores.sub_(lse_BNS[:, :, first:end].reshape(row)).exp_()
        dv[:, start:stop] += _product(weights.to(grad.dtype).mT, grad)
        inner = _product(grad, _keys(v_TBGE[start:stop]).mT)
        inner.sub_(delta_BNS[:, :, first:end].reshape(row)).mul_(weights).mul_(scoring.scale)
        if slope is not None:
            inner.mul_(slope)
        inner = inner.to(q.dtype)
        dq = torch.bmm(inner, _keys(k_TBGD[start:stop]))
        dq_SBND[first:end] = _by_row(dq, batch, heads)
        dk[:, start:stop] += _product(inner.mT, q)
    back = (batch, groups, k_TBGD.size(0), -1)
    dk_TBGD, dv_TBGE = (x.view(back).permute(2, 0, 1, 3) for x in (dk, dv))
    return dq_SBND, dk_TBGD.to(k_TBGD.dtype), dv_TBGE.to(v_TBGE.dtype)


def _spans(q_SBND: Tensor, k_TBGD: Tensor, scoring: Scoring) -> Iterator[tuple[int, int, int, int]]:
    """Yield ranges of queries with the range of keys that they see."""
    queries, batch, heads, _ = q_SBND.shape
    keys = k_TBGD.size(0)
    rows = max(16, _ELEMENTS // max(1, batch * heads * keys))
    for first in range(0, queries, rows):
        end = min(first + rows, queries)
        yield first, end, *scoring.seen(first, end, queries=queries, keys=keys)


def _scores(
    q: Tensor, k_TBGD: Tensor, scoring: Scoring, span: tuple[int, int, int, int], queries: int
) -> tuple[Tensor, Tensor | None]:
    """Return scores ``[B * G, R * C, X]`` and how much capping flattens them, None if it does not.

    Hidden keys have the score ``-inf``.
    """
    first, end, start, stop = span
    keys = k_TBGD.size(0)
    scores = _product(q, _keys(k_TBGD[start:stop]).mT).mul_(scoring.scale)
    slope = None
    if scoring.cap is not None:
        bent = scores.div_(scoring.cap).tanh_()
        slope = 1 - bent.square()
        scores = bent.mul(scoring.cap)
    if scoring.hides(first, end, queries=queries, keys=keys):
        position = torch.arange(first, end, device=q.device)[:, None] + (keys - queries)
        distance = torch.arange(start, stop, device=q.device)[None, :] - position
        left, right = scoring.reach
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            hidden |= distance < -left
        if right >= 0:
            hidden |= distance > right
        by_row = scores.view(scores.size(0), -1, end - first, stop - start)
        by_row.masked_fill_(hidden, float("-inf"))
    return scores, slope


def _by_group(x_CBND: Tensor, groups: int) -> Tensor:
    """Return ``[B * G, R * C, D]``: the rows of all heads that share keys, one after the other."""
    rows, batch, heads, width = x_CBND.shape
    x = x_CBND.permute(1, 2, 0, 3).reshape(batch * groups, (heads // groups) * rows, width)
    return x.contiguous()


def _by_row(x: Tensor, batch: int, heads: int) -> Tensor:
    """Return ``[C, B, N, D]`` of what :func:`_by_group` laid out."""
    return x.view(batch, heads, -1, x.size(-1)).permute(2, 0, 1, 3)


def _keys(x_XBGD: Tensor) -> Tensor:
    """Return ``[B * G, X, D]``."""
    return x_XBGD.permute(1, 2, 0, 3).flatten(0, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of each batch entry, in float32 where the factors have 16 bits."""
    if a.dtype not in _HALVES:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _HALVES else x.dtype
