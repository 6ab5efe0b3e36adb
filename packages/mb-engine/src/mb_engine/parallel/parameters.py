# SPDX-License-Identifier: Apache-2.0
"""Numbers about the whole model's parameters, each counted on one rank alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mb_engine.parallel.shards import model_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn


def count_parameters(chunks: Sequence[nn.Module]) -> int:
    """Return the parameters of the whole model; all ranks call it together."""
    own = sum(s.data.numel() for s in model_shards(chunks) if s.replica_id == 0)
    return int(_sum_over_ranks(torch.tensor(own, dtype=torch.int64, device=_device(chunks))))


def parameters_norm(chunks: Sequence[nn.Module]) -> float:
    """Return the L2 norm of all parameters, as the model holds them; all ranks call it together."""
    own = [s.data for s in model_shards(chunks) if s.replica_id == 0]
    total = torch.zeros((), dtype=torch.float64, device=_device(chunks))
    if own:
        total += torch.stack(torch._foreach_norm(own, dtype=torch.float32)).double().square().sum()  # noqa: SLF001
    return float(_sum_over_ranks(total).sqrt())


def _device(chunks: Sequence[nn.Module]) -> torch.device:
    return next((p.device for c in chunks for p in c.parameters()), torch.device("cpu"))


def _sum_over_ranks(value: Tensor) -> Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value
