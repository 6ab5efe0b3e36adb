# SPDX-License-Identifier: Apache-2.0
"""The part of a sequence that one context-parallel rank works on, and rows of packed samples.

A sequence is cut into ``2 * cp`` chunks; rank r gets chunks r and ``2 * cp - 1 - r``, which
balances causal attention. Of a packed row, every sample is cut so. Source: the order that
megatron-core's rotary embedding and Transformer Engine's attention expect.

Shape suffixes: B = micro-batch, S = sequence, T = tokens of a packed row, n = samples in it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

BOUNDARIES = "cu_seqlens"
LONGEST = "max_seqlen"


@frozen(kw_only=True)
class Packing:
    """How a row of tokens is made up of samples.

    Attributes:
        lengths: Tokens of each sample, in order; none is empty.
        max_length: No sample is longer, now or in another step that is to run the same kernels.
    """

    lengths: tuple[int, ...]
    max_length: int


def read_packing(batch: Mapping[str, Any], *, cp: int = 1) -> Packing | None:
    """Return how the row of a micro-batch is packed, None where it is not.

    Args:
        batch: With ``tokens`` ``[1, T]`` and, if packed, ``cu_seqlens``: integers ``[n + 1]`` or
            ``[1, n + 1]`` on the CPU, from 0 to T, each sample's start and the end; a repeated one
            is an empty sample, which is left out. ``max_seqlen`` (an int or a CPU tensor of one) is
            an upper bound of the lengths; the longest of this row if it is missing.
        cp: Context-parallel degree.

    Raises:
        EngineError: If the boundaries do not describe the row, or do not divide over the ranks.
    """
    boundaries = batch.get(BOUNDARIES)
    if boundaries is None:
        return None
    for name in (BOUNDARIES, LONGEST):
        if getattr(batch.get(name), "is_cuda", False):
            raise EngineError(
                f"batch[{name!r}] is on {batch[name].device}: give it on the CPU, so that no step"
                " has to wait for the device"
            )
    rows, tokens = batch["tokens"].shape
    starts = torch.as_tensor(boundaries).flatten().tolist()
    if rows != 1 or not _describes(starts, tokens):
        raise EngineError(
            f"batch[{BOUNDARIES!r}]={_brief(starts)} with tokens [{rows}, {tokens}]: a packed"
            " micro-batch is one row, and its boundaries rise from 0 to its length"
        )
    lengths = [end - start for start, end in itertools.pairwise(starts) if end > start]
    chunks = 2 * cp if cp > 1 else 1
    odd = next((n for n in lengths if n % chunks), None)
    if odd is not None:
        raise EngineError(
            f"a packed sample has {odd} tokens: with model.context_parallel_size={cp} each sample"
            f" needs a multiple of {chunks}; pad it to {-(-odd // chunks) * chunks} with loss_mask 0"
        )
    longest = max(lengths)
    bound = int(batch.get(LONGEST, longest))
    if bound < longest:
        raise EngineError(
            f"batch[{LONGEST!r}]={bound}: a sample of this row has {longest} tokens; give at least"
            " that, or leave it out"
        )
    return Packing(lengths=tuple(lengths), max_length=bound)


def context_parallel_slice(
    batch: Mapping[str, Tensor], *, cp: int, cp_rank: int, lengths: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Return this rank's two chunks of every sequence tensor, in zig-zag order.

    Args:
        batch: Tensors ``[B, S]`` (any with fewer dimensions are passed on); S divides by 2 * cp.
        cp: Context-parallel degree.
        cp_rank: This rank's coordinate.
        lengths: Of the samples of a packed row, each of which is cut; each divides by 2 * cp.
    """
    if cp == 1:
        return dict(batch)
    rows = None if lengths is None else rows_of_rank(lengths, cp=cp, cp_rank=cp_rank)
    chunks = (cp_rank, 2 * cp - 1 - cp_rank)

    def pick(x_BS: Tensor) -> Tensor:
        if rows is not None:
            return x_BS.index_select(1, rows.to(x_BS.device, non_blocking=True))
        parts = x_BS.view(x_BS.size(0), 2 * cp, x_BS.size(1) // (2 * cp), *x_BS.shape[2:])
        return torch.cat([parts[:, c] for c in chunks], dim=1)

    return {k: pick(v) if v.dim() > 1 else v for k, v in batch.items()}


def positions(lengths: Sequence[int]) -> Tensor:
    """Return the place of each token in its sample, int64 ``[T]``."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)


def chunk_of_row(lengths: Sequence[int], chunks: int) -> Tensor:
    """Return which of the *chunks* chunks of its sample each token is in, int64 ``[T]``."""
    sizes = torch.tensor(lengths)
    return positions(lengths) // (sizes // chunks).repeat_interleave(sizes)


def rows_of_rank(lengths: Sequence[int], *, cp: int, cp_rank: int) -> Tensor:
    """Return which tokens of a packed row a rank works on, int64 ``[T / cp]``."""
    if cp == 1:
        return torch.arange(sum(lengths))
    chunk = chunk_of_row(lengths, 2 * cp)
    return ((chunk == cp_rank) | (chunk == 2 * cp - 1 - cp_rank)).nonzero().flatten()


def _describes(starts: list[int], tokens: int) -> bool:
    rises = all(a <= b for a, b in itertools.pairwise(starts))
    return bool(starts) and starts[0] == 0 and starts[-1] == tokens and rises and tokens > 0


def _brief(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:4]))
    return f"[{shown}, ..., {numbers[-1]}]" if len(numbers) > 5 else f"[{shown}]"
