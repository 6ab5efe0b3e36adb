# SPDX-License-Identifier: Apache-2.0
"""Losses beside the main one, for the log: balance of experts and predictions further ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_config.records import ProcessLayout
    from torch import Tensor

_Z_LOSS = "z_loss"


class AuxiliaryLosses:
    """What the routers and the layers for predictions ahead of one model record while they run."""

    def __init__(self, chunks: Sequence[Any], layout: ProcessLayout) -> None:
        """Find them.

        Args:
            chunks: Model chunks of this rank, wrapped or not, complete.
            layout: This rank's place.
        """
        from megatron.core.utils import get_model_config

        from mb_engine.model.moe_router import BalancedRouter

        config = get_model_config(chunks[0])
        self._layout = layout
        self._names = _balancing_losses(config)
        self._depth: int = getattr(config, "mtp_num_layers", None) or 0
        modules = [m for c in chunks for m in c.modules()] if self._names or self._depth else []
        self._routers = [m for m in modules if isinstance(m, BalancedRouter) and self._names]
        self._ahead = [m for m in modules if hasattr(m, "recorded_ahead") and self._depth]

    def take(self, *, num_microbatches: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what the model recorded since the last call, and forget it.

        One small all-reduce over all ranks; nothing waits for the device. Without experts and
        without predictions ahead it is empty and nothing is sent. All ranks call it together.

        Args:
            num_microbatches: Of one data-parallel rank.

        Returns:
            Sum and count by name, the same on every rank. Their ratio is the mean over the layers
            with experts and over micro-batches (``load_balancing_loss`` and others, without
            coefficients), or over the tokens predicted (``mtp_1_loss``, ``mtp_2_loss``, ...).
        """
        layout, names, depth = self._layout, self._names, self._depth
        if not names and not depth:
            return {}
        nothing = torch.zeros((), dtype=torch.float32, device=layout.device)
        found = [_taken(self._routers, name, nothing) for name in names]
        ahead = _taken_ahead(self._ahead, depth, nothing)
        found += [*ahead.flatten(), nothing + len(self._routers)]
        packed = torch.stack(found).double()
        torch.distributed.all_reduce(packed)
        *sums, parts = packed.unbind()
        alike = layout.tp * layout.cp * layout.dp
        # Tensor-parallel ranks have the same predictions ahead.
        rest = [x / layout.tp for x in sums[len(names) :]]
        result = {f"mtp_{k + 1}_loss": (rest[2 * k], rest[2 * k + 1]) for k in range(depth)}
        for name, total in zip(names, sums[: len(names)], strict=True):
            together = name.startswith("global_")  # one loss for all data-parallel ranks
            losses = num_microbatches * (1 if together else layout.dp)
            result[name] = total, parts * (losses / alike)
        return result


def _balancing_losses(config: Any) -> list[str]:
    """Return the names of the losses that a model of this configuration records."""
    from mb_engine.model.moe_router import LOSSES

    if config.num_moe_experts is None:
        return []
    kinds, weights = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, weights = [kinds], [weights]
    names = [LOSSES[k] for k, w in zip(kinds, weights, strict=True) if k in LOSSES and w > 0]
    return [*names, _Z_LOSS] if config.moe_z_loss_coeff else names


def _taken(routers: Sequence[Any], name: str, nothing: Tensor) -> Tensor:
    """Return the sum of one loss over *routers* and set it to zero there."""
    parts = [r.recorded[name] for r in routers if name in r.recorded]
    if not parts:
        return nothing
    total = torch.stack(parts).sum(0)
    for part in parts:
        part.zero_()
    return total


def _taken_ahead(models: Sequence[Any], depth: int, nothing: Tensor) -> Tensor:
    """Return the sums of loss and count of predictions ahead ``[depth, 2]``; zero them there."""
    total = nothing.expand(depth, 2).clone()
    for model in models:
        if model.recorded_ahead is not None:
            total += model.recorded_ahead
            model.recorded_ahead.zero_()
    return total
