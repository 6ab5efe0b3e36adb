# SPDX-License-Identifier: Apache-2.0
"""Numbers about the whole model's parameters, each counted on one rank alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_config.records import TensorShard
    from torch import Tensor


def count_parameters(shards: Sequence[TensorShard], device: str) -> int:
    """Return the parameters of the whole model; all ranks call it together.

    Args:
        shards: This rank's pieces of the model.
        device: Where ranks can exchange a number.
    """
    own = sum(s.data.numel() for s in shards if s.replica_id == 0)
    return int(_sum_over_ranks(torch.tensor(own, dtype=torch.int64, device=device)))


def parameters_norm(shards: Sequence[TensorShard], device: str) -> float:
    """Return the L2 norm of all parameters, as the model holds them; all ranks call it together.

    Args:
        shards: This rank's pieces of the model.
        device: Where ranks can exchange a number.
    """
    own = [s.data for s in shards if s.replica_id == 0]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if own:
        total += torch.stack(torch._foreach_norm(own, dtype=torch.float32)).double().square().sum()  # noqa: SLF001
    return float(_sum_over_ranks(total).sqrt())


def _sum_over_ranks(value: Tensor) -> Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value
