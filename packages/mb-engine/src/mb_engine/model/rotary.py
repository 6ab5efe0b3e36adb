# SPDX-License-Identifier: Apache-2.0
"""Rotary positions applied to queries and keys while they are taken out of the fused projection.

Shape suffixes, all local to the rank: S = tokens of a sequence, B = micro-batch, G = key and value
heads, R = query heads of one group, D = width of a head.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from mb_engine.model.autograd import first_order

if TYPE_CHECKING:
    from torch import Tensor

_KEY_AND_VALUE = 2


@functools.lru_cache(maxsize=4)
def rotary_table(angles_S11D: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine of *angles*, each ``[S, 1, 1, 1, D]``, computed once.

    Args:
        angles_S11D: From megatron-core's ``RotaryEmbedding``, which hands out the same tensor for
            every step of a length; both halves of D are equal.
        dtype: Of the result.
    """
    angles = angles_S11D.unsqueeze(3)
    sine = angles.sin()
    sine[..., : sine.size(-1) // 2].neg_()
    return angles.cos().to(dtype), sine.to(dtype)


def split_and_rotate(
    mixed: Tensor, cos_S111D: Tensor, sin_S111D: Tensor, *, groups: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries ``[S, B, G * R, D]``, rotated keys and values ``[S, B, G, D]``.

    The two halves of a head are turned by the angle of its position:
    ``(a, b) -> (a cos - b sin, b cos + a sin)``. Queries and keys are rotated in one go.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34, with the pairs of Llama (halves of a head).

    Args:
        mixed: ``[S, B, G * (R + 2) * D]``: of each group its R queries, its key and its value.
        cos_S111D: From :func:`rotary_table`; ``[S, 1, 1, 1, D]``, of the dtype of *mixed*.
        sin_S111D: The same.
        groups: G.
        width: D, even.
    """
    mixed_SBGXD = mixed.view(mixed.size(0), mixed.size(1), groups, -1, width)
    query, key, value = _SplitAndRotate.apply(  # type: ignore[no-untyped-call]
        mixed_SBGXD, cos_S111D, sin_S111D
    )
    return query, key, value


class _SplitAndRotate(torch.autograd.Function):
    """The rotation and its inverse, written into one buffer each."""

    @staticmethod
    def forward(
        ctx: Any, mixed_SBGXD: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split [S, B, G, R + 2, D] into rotated queries, rotated keys and values."""
        seq, batch, groups, heads, width = mixed_SBGXD.shape
        ctx.save_for_backward(cos, sin)
        queries = heads - _KEY_AND_VALUE
        straight = mixed_SBGXD[..., : queries + 1, :]
        turned = torch.addcmul(straight * cos, straight.roll(width // 2, -1), sin)
        query = turned[..., :queries, :].reshape(seq, batch, groups * queries, width)
        return query, turned[..., queries, :], mixed_SBGXD[..., queries + 1, :]

    @staticmethod
    @first_order
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None]:
        """Turn the gradients back and put them side by side."""
        cos, sin = ctx.saved_tensors
        seq, batch, groups, width = key.shape
        by_group = query.reshape(seq, batch, groups, -1, width)
        mixed = torch.cat((by_group, key.unsqueeze(3), value.unsqueeze(3)), dim=3)
        rotated = mixed[..., :-1, :]
        # Rolling by half swaps the halves, so that it is its own inverse and flips the sine's sign.
        swapped = rotated.roll(width // 2, -1)
        rotated.mul_(cos).addcmul_(swapped, sin, value=-1)
        return mixed, None, None
