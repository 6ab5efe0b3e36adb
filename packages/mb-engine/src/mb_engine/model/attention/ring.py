# SPDX-License-Identifier: Apache-2.0
"""Context parallelism in which keys and values travel from rank to rank while each computes.

A rank holds two chunks of every sequence in zig-zag order
(:mod:`mb_engine.parallel.sequence`): an early one and a late one. In step s it has the keys and
values of the rank s places before it in the ring, and causality leaves three cases:

- its own: plain causal attention, since both chunks are in order;
- of an earlier rank: all queries see the early chunk, none the late one;
- of a later rank: the late queries see both chunks, the early ones neither.

So every step after the first is half the work of a whole block, on every rank. The next block is
under way while one is computed. Backward, keys and values go around once more, and their gradients
follow one step behind, until they are back with their owner.

Source: Liu et al. 2023, arXiv:2310.01889; zig-zag order as in Transformer Engine.

Shape suffixes, all local to the rank: S = tokens, B = micro-batch, N = query heads,
G = key and value heads, D = width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from torch import distributed as dist

from mb_engine.model.autograd import first_order

if TYPE_CHECKING:
    from torch import Tensor

    from mb_engine.model.attention.blocks import BlockKernel
    from mb_engine.model.attention.packed import PackedSequences, Segments
    from mb_engine.model.attention.scoring import Scoring

_HALVES = (torch.float16, torch.bfloat16)
_KEYS, _GRADIENTS = 1, 2
_CHUNK, _BOTH = 1, 2


def ring_attention(
    q_SBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    *,
    scoring: Scoring,
    kernel: BlockKernel,
    group: Any,
    packed: PackedSequences | None = None,
) -> Tensor:
    """Return causal attention ``[S, B, N, D]`` of this rank's queries to the whole sequences.

    Args:
        q_SBND: Queries of this rank's two chunks; any float dtype. N is a multiple of G.
        k_SBGD: Keys of the same chunks.
        v_SBGD: Values of the same chunks, as wide as the keys.
        scoring: Causal, without a window.
        kernel: From :func:`mb_engine.model.attention.blocks.block_kernel`.
        group: Context-parallel process group.
        packed: How the rows are packed, None if they are whole sequences.

    Cost: cp - 1 messages of ``2 * S * B * G * D`` elements forward; backward the same and cp
    messages of gradients, in float32 where the inputs have 16 bits. Saved for the backward pass:
    the arguments, the output and ``[B, N, S]`` sums.
    """
    ring = _Ring(scoring=scoring, kernel=kernel, group=group, packed=packed)
    return _RingAttention.apply(q_SBND, k_SBGD, v_SBGD, ring)  # type: ignore[no-any-return, no-untyped-call]


@frozen(kw_only=True, eq=False)
class _Ring:
    """What a pass around the ring needs to know beside its tensors."""

    scoring: Scoring
    kernel: BlockKernel
    group: Any
    packed: PackedSequences | None

    @property
    def ranks(self) -> int:
        return int(self.group.size())

    @property
    def rank(self) -> int:
        return int(self.group.rank())

    def source(self, step: int) -> int:
        """Return whose keys and values this rank has in *step*."""
        return (self.rank - step) % self.ranks

    def uncausal(self) -> Scoring:
        return evolve(self.scoring, causal=False)

    def segments(self, queries: int, keys: int) -> Segments | None:
        return None if self.packed is None else self.packed.segments(queries, keys)

    def early(self, x: Tensor) -> Tensor:
        """Return the rows of the earlier chunks; dimension 0 are the tokens."""
        if self.packed is None:
            return x[: x.size(0) // 2]
        return x.index_select(0, self.packed.halves()[0])

    def late(self, x: Tensor) -> Tensor:
        """Return the rows of the later chunks; dimension 0 are the tokens."""
        if self.packed is None:
            return x[x.size(0) // 2 :]
        return x.index_select(0, self.packed.halves()[1])

    def add_early(self, total: Tensor, part: Tensor) -> None:
        """Add *part* to the rows of the earlier chunks of *total*."""
        if self.packed is None:
            total[: total.size(0) // 2] += part
        else:
            total.index_add_(0, self.packed.halves()[0], part.to(total.dtype))

    def add_late(self, total: Tensor, part: Tensor) -> None:
        """Add *part* to the rows of the later chunks of *total*."""
        if self.packed is None:
            total[total.size(0) // 2 :] += part
        else:
            total.index_add_(0, self.packed.halves()[1], part.to(total.dtype))

    def put_late(self, total: Tensor, part: Tensor) -> None:
        """Replace the rows of the later chunks of *total*."""
        if self.packed is None:
            total[total.size(0) // 2 :] = part
        else:
            total.index_copy_(0, self.packed.halves()[1], part)

    def pass_on(self, sent: Tensor, tag: int) -> _Passing:
        """Begin to send *sent* to the next rank, and to receive its like from the one before."""
        received = torch.empty_like(sent)
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.ranks)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.ranks)
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, after, self.group, tag),
                dist.P2POp(dist.irecv, received, before, self.group, tag),
            ]
        )
        return _Passing(sent=sent, received=received, requests=requests)


@frozen(kw_only=True, eq=False)
class _Passing:
    """A message under way in both directions; what is sent must stay as it is."""

    sent: Tensor
    received: Tensor
    requests: list[Any]

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received


class _RingAttention(torch.autograd.Function):
    """Both ways around the ring."""

    @staticmethod
    def forward(ctx: Any, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, ring: _Ring) -> Tensor:
        """Attend to one block after the other and merge what they give."""
        out_SBND, lse_SBN = _around(q_SBND, k_SBGD, v_SBGD, ring)
        ctx.save_for_backward(q_SBND, k_SBGD, v_SBGD, out_SBND, lse_SBN)
        ctx.ring = ring
        return out_SBND

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_SBND: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Send keys and values around again, and their gradients after them."""
        q, k, v, out, lse = ctx.saved_tensors
        return *_around_again(grad_SBND, q, k, v, out, lse, ctx.ring), None


def _around(q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp ``[S, B, N]``."""
    kernel, full = ring.kernel, ring.uncausal()
    block = torch.stack((k_SBGD, v_SBGD))
    passing = ring.pass_on(block, _KEYS)
    segments = ring.segments(_BOTH, _BOTH)
    part, sums = kernel.forward(q_SBND, k_SBGD, v_SBGD, ring.scoring, segments)
    dtype = torch.float32 if q_SBND.dtype in _HALVES else q_SBND.dtype
    out, lse = part.to(dtype), sums.permute(2, 0, 1).to(dtype)
    for step in range(1, ring.ranks):
        block = passing.wait()
        if step + 1 < ring.ranks:
            passing = ring.pass_on(block, _KEYS)
        key, value = block
        if ring.source(step) < ring.rank:
            seen = ring.early(key), ring.early(value)
            part, sums = kernel.forward(q_SBND, *seen, full, ring.segments(_BOTH, _CHUNK))
            out, lse = _merged(out, lse, part, sums)
        else:
            segments = ring.segments(_CHUNK, _BOTH)
            part, sums = kernel.forward(ring.late(q_SBND), key, value, full, segments)
            late_out, late_lse = _merged(ring.late(out), ring.late(lse), part, sums)
            ring.put_late(out, late_out)
            ring.put_late(lse, late_lse)
    return out.to(q_SBND.dtype), lse


def _around_again(  # noqa: PLR0917 - as they were saved
    grad_SBND: Tensor,
    q_SBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    out_SBND: Tensor,
    lse_SBN: Tensor,
    ring: _Ring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    block = torch.stack((k_SBGD, v_SBGD))
    of_queries = grad_SBND, q_SBND, out_SBND, lse_SBN
    dq_SBND = torch.zeros_like(q_SBND, dtype=lse_SBN.dtype)
    following: _Passing | None = None
    for step in range(ring.ranks):
        passing = ring.pass_on(block, _KEYS) if step + 1 < ring.ranks else None
        gradients = _block_gradients(step, of_queries, block, dq_SBND, ring)
        if following is not None:
            # What the ranks before added up for this very block.
            gradients += following.wait()
        following = ring.pass_on(gradients, _GRADIENTS)
        if passing is not None:
            block = passing.wait()
    assert following is not None
    dk_SBGD, dv_SBGD = following.wait()
    return dq_SBND.to(q_SBND.dtype), dk_SBGD.to(k_SBGD.dtype), dv_SBGD.to(v_SBGD.dtype)


def _block_gradients(
    step: int, of_queries: tuple[Tensor, ...], block: Tensor, dq_SBND: Tensor, ring: _Ring
) -> Tensor:
    """Add to the gradient of the queries; return those of the block, ``[2, S, B, G, D]``."""
    kernel, full = ring.kernel, ring.uncausal()
    grad, q, out, lse = of_queries
    key, value = block
    if step == 0:
        segments = ring.segments(_BOTH, _BOTH)
        dq, dk, dv = kernel.backward(
            grad, q, key, value, out, _heads_first(lse), ring.scoring, segments
        )
        dq_SBND += dq
        return torch.stack((dk, dv)).to(dq_SBND.dtype)
    if ring.source(step) < ring.rank:
        segments = ring.segments(_BOTH, _CHUNK)
        seen = ring.early(key), ring.early(value)
        dq, dk, dv = kernel.backward(grad, q, *seen, out, _heads_first(lse), full, segments)
        dq_SBND += dq
        gradients = torch.zeros_like(block, dtype=dq_SBND.dtype)
        ring.add_early(gradients[0], dk)
        ring.add_early(gradients[1], dv)
        return gradients
    segments = ring.segments(_CHUNK, _BOTH)
    grad, q, out, lse = map(ring.late, of_queries)
    dq, dk, dv = kernel.backward(grad, q, key, value, out, _heads_first(lse), full, segments)
    ring.add_late(dq_SBND, dq)
    return torch.stack((dk, dv)).to(dq_SBND.dtype)


def _merged(
    out_SBND: Tensor, lse_SBN: Tensor, part_SBND: Tensor, sums_BNS: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output over the keys of both parts, and its log-sum-exp."""
    sums_SBN = sums_BNS.permute(2, 0, 1).to(lse_SBN.dtype)
    both_SBN = torch.logaddexp(lse_SBN, sums_SBN)
    old, new = (lse_SBN - both_SBN).exp_(), (sums_SBN - both_SBN).exp_()
    return out_SBND * old.unsqueeze(-1) + part_SBND * new.unsqueeze(-1), both_SBN


def _heads_first(lse_SBN: Tensor) -> Tensor:
    return lse_SBN.permute(1, 2, 0).contiguous()
