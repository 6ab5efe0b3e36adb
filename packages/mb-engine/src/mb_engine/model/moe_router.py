# SPDX-License-Identifier: Apache-2.0
"""Routing of tokens to experts that does not depend on how tokens are spread over ranks.

Megatron-core's router looks at the tokens of its own rank. Where tensor- or context-parallel ranks
share the tokens of a micro-batch, 0.16 divides the gradients of its balancing losses by their
number, and both versions balance by Sinkhorn and drop tokens rank by rank; the loss over the global
batch is divided by the data-parallel size. This router counts over all ranks that share the tokens,
so that one rank and many train alike.

Shape suffixes: T = tokens on this rank, A = tokens of all ranks that share the micro-batch,
E = experts.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

if TYPE_CHECKING:
    from torch import Tensor

LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""What each kind of balancing loss is logged as; the z-loss is ``z_loss``."""


class BalancedRouter(TopKRouter):  # type: ignore[misc]
    """Sends every token to its top experts; same parameters as megatron-core's ``TopKRouter``.

    ``recorded`` holds, by name, this rank's part of each balancing loss without its coefficient,
    summed over the micro-batches since it was last emptied. The parts of all ranks add up to the
    sum over micro-batches.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4, over a micro-batch (aux_loss), over each
    sequence as in DeepSeek-V3, arXiv:2412.19437, eq. 17 (seq_aux_loss), or with the load of all
    data-parallel ranks and earlier micro-batches of the step as in Qiu et al. 2025,
    arXiv:2501.11873 (global_aux_loss). Z-loss: Zoph et al. 2022, arXiv:2202.08906, eq. 5. Sinkhorn:
    Clark et al. 2022, arXiv:2202.01169. Capacity: Lepikhin et al. 2020, arXiv:2006.16668.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``TopKRouter``."""
        super().__init__(config, *args, **kwargs)
        self.recorded: dict[str, Tensor] = {}
        self._tokens: Any = 0
        self._capacity_factor = config.moe_expert_capacity_factor
        self.config: Any = config
        if self._capacity_factor is not None and not config.moe_pad_expert_input_to_capacity:
            # Tokens are dropped here. Padding fixes what each rank sends, so there every rank
            # counts for itself, as megatron-core does.
            self.config = copy.copy(config)
            self.config.moe_expert_capacity_factor = None

    def routing(
        self, logits: Tensor, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return weights and choice of experts, ``[T, E]`` each.

        Args:
            logits: ``[S, B, E]`` of this rank's tokens.
            padding_mask: ``[S, B]``, True for tokens that do not count.
            **kwargs: As ``TopKRouter`` takes them.
        """
        length, samples = logits.shape[:2]
        self._tokens = length * samples if padding_mask is None else (~padding_mask).sum()
        probs_TE, chosen_TE = super().routing(logits, padding_mask, **kwargs)
        if self._capacity_factor is None or self.config.moe_expert_capacity_factor is not None:
            return probs_TE, chosen_TE
        kept_TE = self._within_capacity(probs_TE, chosen_TE)
        return probs_TE * kept_TE, chosen_TE & kept_TE

    def sinkhorn_load_balancing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and choice of experts, balanced over all tokens of the micro-batch.

        Args:
            logits: ``[T, E]``.
        """
        if not self.training or self.tp_cp_group.size() == 1:
            return super().sinkhorn_load_balancing(logits)  # type: ignore[no-any-return]
        with torch.no_grad():
            balanced_AE = moe_utils.sinkhorn(self._of_all_ranks(logits.float()))
            indices = self._own_rows(balanced_AE, like=logits).topk(self.topk, dim=1).indices
            chosen_TE = torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, value=True)
        scores_TE = (
            logits.sigmoid()
            if self.topk == 1
            else logits.softmax(-1, dtype=torch.float32).type_as(logits)
        )
        return scores_TE * chosen_TE, chosen_TE

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        **_kwargs: Any,
    ) -> Tensor:
        """Return *activation*, whose backward pass adds the gradient of the balancing loss.

        Args:
            activation: ``[T, E]``.
            aux_loss_coeff: The loss's weight, already in *aux_loss*.
            aux_loss: Scalar; parts of the ranks of *reduce_group* add up to the loss.
            aux_loss_name: What it is logged as.
            reduce_group: Ranks whose tokens the loss is over.
        """
        self._record(aux_loss_name, aux_loss / aux_loss_coeff)
        return self._attach(activation, aux_loss, reduce_group.size())

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return *logits*, whose backward pass adds the gradient of the z-loss.

        Args:
            logits: ``[T, E]``.
            padding_mask: ``[T]``, True for tokens that do not count.
        """
        weight = self.config.moe_z_loss_coeff
        if not weight or not self.training or not torch.is_grad_enabled():
            return logits
        ranks = self.tp_cp_group.size()
        part = moe_utils.z_loss_func(logits, weight / ranks, padding_mask=padding_mask)
        self._record("z_loss", part / weight)
        return self._attach(logits, part, ranks)

    def _attach(self, activation: Tensor, part: Tensor, ranks: int) -> Tensor:
        """Let the gradient of *part* join that of *activation*, on the scale of the main loss.

        Gradients are divided by all tokens of the step at its end, which are this rank's times
        *ranks*, times how many other losses of this kind there are to average over; or, without
        the loss by token, by the latter alone.
        """
        if self.calculate_per_token_loss:
            scale = self._tokens * ranks
        else:
            scale = ranks // self.tp_cp_group.size()
        attached: Tensor = moe_utils.MoEAuxLossAutoScaler.apply(activation, part * scale)
        return attached

    def _record(self, name: str, part: Tensor) -> None:
        part = part.detach().float()
        if name not in self.recorded:
            self.recorded[name] = torch.zeros_like(part)
        self.recorded[name].add_(part)

    def _within_capacity(self, probs_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        """Return which of the chosen pairs an expert has room for."""
        with torch.no_grad():
            chosen_AE = self._of_all_ranks(chosen_TE.to(probs_TE.dtype))
            capacity = moe_utils.get_capacity(
                num_tokens=chosen_AE.size(0) * self.topk,
                num_experts=chosen_AE.size(1),
                capacity_factor=self._capacity_factor,
            )
            if capacity >= chosen_AE.size(0):
                return torch.ones_like(chosen_TE)
            if self.config.moe_token_drop_policy == "position":  # noqa: S105
                kept_AE = chosen_AE.cumsum(0) <= capacity
            else:
                best = self._of_all_ranks(probs_TE).topk(capacity, dim=0).indices
                kept_AE = torch.zeros_like(chosen_AE, dtype=torch.bool).scatter(0, best, value=True)
            return self._own_rows(kept_AE, like=chosen_TE)

    def _of_all_ranks(self, x_TE: Tensor) -> Tensor:
        """Return ``[A, E]``, one rank's rows after the other's."""
        if self.tp_cp_group.size() == 1:
            return x_TE
        whole: Tensor = gather_from_sequence_parallel_region(
            x_TE.contiguous(), group=self.tp_cp_group
        )
        return whole

    def _own_rows(self, x_AE: Tensor, *, like: Tensor) -> Tensor:
        first = self.tp_cp_group.rank() * like.size(0)
        return x_AE[first : first + like.size(0)]
