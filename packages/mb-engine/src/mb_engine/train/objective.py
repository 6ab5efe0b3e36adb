# SPDX-License-Identifier: Apache-2.0
"""The language-model loss: next-token cross-entropy, summed over unmasked tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_config.records import LossTerms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class LanguageModelObjective:
    """Sums the per-token losses that the model returns where ``loss_mask`` is 1.

    The mean over the *global* batch is taken once, over all micro-batches and ranks, so that the
    loss does not depend on how a batch is split.
    """

    consumes = "token_losses"

    def __call__(self, output: Tensor, batch: Mapping[str, Tensor]) -> LossTerms:
        """Return the masked sum of *output*.

        Args:
            output: Per-token losses ``[B, S]``, float.
            batch: With ``loss_mask`` ``[B, S]``, 1 where a token counts.
        """
        mask_BS = batch["loss_mask"]
        losses_BS = output.float()
        return LossTerms(loss_sum=(losses_BS * mask_BS).sum(), num_tokens=mask_BS.sum().int())


def make_language_model_objective() -> LanguageModelObjective:
    """Return the built-in objective; the ``lm`` entry point."""
    return LanguageModelObjective()
