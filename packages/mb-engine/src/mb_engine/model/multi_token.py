# SPDX-License-Identifier: Apache-2.0
"""Predictions of tokens further ahead (multi-token prediction) and their losses.

Shape suffixes: S = tokens of a sequence, B = micro-batch, H = hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

_OF_THE_DECODER = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "inference_params",
    "rotary_pos_emb",
    "rotary_pos_cos",
    "rotary_pos_sin",
    "sequence_len_offset",
)


class MultiTokenGPTModel(GPTModel):  # type: ignore[misc]
    """``GPTModel`` whose losses of predictions ahead weigh the same in every layout and version.

    Layer k predicts token ``i + 1 + k`` from the states of layer k - 1 at token i and the embedding
    of token ``i + k``, with the embedding and output layer of the model. In training the gradient
    is that of::

        sum_i m_i l_i / N  +  factor / D * sum_k sum_i m_(i+k) l_(k, i) / N

    for D layers, token losses l, mask m and N unmasked tokens of the step. (Megatron-core 0.19
    instead takes the mean within each micro-batch, which depends on how a batch is split.)

    ``recorded_ahead`` holds the sums of loss and of mask a layer, ``[D, 2]``, since it was last
    emptied; None before the first step.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.2, eq. 21 to 25.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``GPTModel``."""
        super().__init__(*args, **kwargs)
        self.recorded_ahead: Tensor | None = None

    def _postprocess(
        self, *, hidden_states: Tensor, labels: Tensor | None, loss_mask: Any = None, **rest: Any
    ) -> Tensor:
        """Return token losses or logits; on a stage without them, the states to send on."""
        depth = self.config.mtp_num_layers
        if not depth:
            return super()._postprocess(  # type: ignore[no-any-return]
                hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **rest
            )
        # In evaluation they are needed only where a later stage expects them.
        runs_ahead = self.mtp_process and (self.training or not self.post_process)
        if runs_ahead:
            hidden_states = self._states_ahead(hidden_states, rest)
        if not self.post_process:
            return hidden_states
        ahead: tuple[Tensor, ...] = ()
        if runs_ahead or not self.mtp_process:
            hidden_states, *others = hidden_states.chunk(1 + depth, dim=0)
            ahead = tuple(others)
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        if self.training:
            hidden_states = self._with_losses_ahead(hidden_states, ahead, labels, loss_mask, weight)
        logits, _ = self.output_layer(hidden_states, weight=weight)
        if labels is None:
            return logits.transpose(0, 1).contiguous()  # type: ignore[no-any-return]
        return self.compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]

    def _states_ahead(self, hidden_SBH: Tensor, rest: dict[str, Any]) -> Tensor:
        """Return the states of the model and of every layer ahead, one after the other in S."""
        if rest.get("packed_seq_params") is not None:
            raise EngineError(
                "model.mtp_num_layers: predictions ahead would cross from one packed sample into"
                " the next; train on sequences that are not packed, or leave it out"
            )
        arguments: dict[str, Any] = {name: rest.get(name) for name in _OF_THE_DECODER}
        if arguments["position_ids"] is None:
            # They are shifted, and only learned positions, which are refused, would read them.
            arguments["position_ids"] = torch.zeros_like(arguments["input_ids"])
        states: Tensor = self.mtp(
            hidden_states=hidden_SBH,
            embedding=self.embedding,
            **arguments,
            **(rest.get("extra_block_kwargs") or {}),
        )
        return states

    def _with_losses_ahead(
        self,
        hidden_SBH: Tensor,
        ahead: tuple[Tensor, ...],
        labels_BS: Tensor | None,
        mask_BS: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor:
        """Return *hidden_SBH*, whose backward pass adds the gradients of the losses ahead."""
        if labels_BS is None:
            raise EngineError(
                "model.mtp_num_layers: its layers learn from the labels, and this objective reads"
                " logits alone; leave it out, or train with the language-model objective"
            )
        config, group = self.config, self.pg_collection.cp
        labels = labels_BS
        mask = torch.ones_like(labels_BS, dtype=torch.float32) if mask_BS is None else mask_BS
        scale: Any = config.mtp_loss_scaling_factor / len(ahead)
        if not config.calculate_per_token_loss:
            scale = scale / mask.sum().clamp(min=1)
        sums = []
        for states_SBH in ahead:
            labels, _ = roll_tensor(labels, shifts=-1, dims=-1, cp_group=group)
            mask, _ = roll_tensor(mask, shifts=-1, dims=-1, cp_group=group)
            logits, _ = self.output_layer(states_SBH, weight=weight)
            losses = self.compute_language_model_loss(labels, logits) * mask
            sums.append(torch.stack((losses.detach().sum(), mask.sum())))
            hidden_SBH = MTPLossAutoScaler.apply(hidden_SBH, scale * losses)
        self._record(torch.stack(sums).float())
        return hidden_SBH

    def _record(self, sums: Tensor) -> None:
        if self.recorded_ahead is None:
            self.recorded_ahead = torch.zeros_like(sums)
        self.recorded_ahead.add_(sums)
