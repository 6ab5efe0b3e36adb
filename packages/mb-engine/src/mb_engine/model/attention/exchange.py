# SPDX-License-Identifier: Apache-2.0
"""Context parallelism by collectives: gathered keys and values, or heads for sequence parts.

Shape suffixes: S = tokens of this rank, T = tokens of all ranks, B = micro-batch, H = heads,
D = width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

    from mb_engine.model.attention.packed import PackedSequences


def gather_rows(x_SBHD: Tensor, group: Any) -> Tensor:
    """Return the rows of rank 0, then of rank 1 and so on, ``[T, B, H, D]``.

    The gradient is reduced and scattered over the ranks.
    """
    return gather_from_sequence_parallel_region(x_SBHD, group=group)  # type: ignore[no-any-return]


def in_order(x_TBHD: Tensor, ranks: int, packed: PackedSequences | None) -> Tensor:
    """Return gathered rows in the order of the sequences."""
    if packed is not None:
        return x_TBHD.index_select(0, packed.in_order())
    parts = x_TBHD.view(ranks, 2, -1, *x_TBHD.shape[1:])
    return torch.cat([parts[:, 0], parts[:, 1].flip(0)]).flatten(0, 1)


def in_parts(x_TBHD: Tensor, ranks: int, packed: PackedSequences | None) -> Tensor:
    """Return rows in the order of the sequences as those of rank 0, rank 1 and so on."""
    if packed is not None:
        return x_TBHD.index_select(0, packed.back_in_parts())
    chunks = x_TBHD.view(2, ranks, -1, *x_TBHD.shape[1:])
    return torch.stack([chunks[0], chunks[1].flip(0)], dim=1).flatten(0, 2)


def heads_for_rows(x_SBHD: Tensor, group: Any) -> Tensor:
    """Give away rows of other ranks' heads for all rows of this rank's: ``[T, B, H / cp, D]``.

    Rows come as :func:`gather_rows` has them. Source: Jacobs et al. 2023, arXiv:2309.14509.
    """
    ranks = group.size()
    rows, batch, heads, width = x_SBHD.shape
    by_rank = x_SBHD.view(rows, batch, ranks, heads // ranks, width).permute(2, 0, 1, 3, 4)
    return _AllToAll.apply(by_rank, group).flatten(0, 1)  # type: ignore[no-any-return, no-untyped-call]


def rows_for_heads(x_TBHD: Tensor, group: Any) -> Tensor:
    """Undo :func:`heads_for_rows`: ``[T, B, H / cp, D]`` to ``[S, B, H, D]``."""
    ranks = group.size()
    by_rank = x_TBHD.view(ranks, -1, *x_TBHD.shape[1:])
    received = _AllToAll.apply(by_rank, group)  # type: ignore[no-untyped-call]
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    """Send entry r of the first dimension to rank r; the gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """Exchange."""
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Exchange back."""
        return _exchanged(grad, ctx.group), None


def _exchanged(x: Tensor, group: Any) -> Tensor:
    sent = x.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
