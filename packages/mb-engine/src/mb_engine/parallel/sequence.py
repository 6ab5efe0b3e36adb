# SPDX-License-Identifier: Apache-2.0
"""The part of a sequence that one context-parallel rank works on.

Shape suffixes: B = micro-batch, S = sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def context_parallel_slice(
    batch: Mapping[str, Tensor], *, cp: int, cp_rank: int
) -> dict[str, Tensor]:
    """Return this rank's two chunks of every sequence tensor, in zig-zag order.

    A sequence is cut into ``2 * cp`` chunks; rank r gets chunks r and ``2 * cp - 1 - r``, which
    balances causal attention. Source: the order that megatron-core's rotary embedding expects.

    Args:
        batch: Tensors ``[B, S]`` (any with fewer dimensions are passed on); S divides by 2 * cp.
        cp: Context-parallel degree.
        cp_rank: This rank's coordinate.
    """
    if cp == 1:
        return dict(batch)
    chunks = (cp_rank, 2 * cp - 1 - cp_rank)

    def pick(x_BS: Tensor) -> Tensor:
        parts = x_BS.view(x_BS.size(0), 2 * cp, x_BS.size(1) // (2 * cp), *x_BS.shape[2:])
        return torch.cat([parts[:, c] for c in chunks], dim=1)

    return {k: pick(v) if v.dim() > 1 else v for k, v in batch.items()}
