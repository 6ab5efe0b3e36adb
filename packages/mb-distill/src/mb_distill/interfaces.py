# SPDX-License-Identifier: Apache-2.0
"""The shape of a distillation loss, matched without an import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mb_config.records import LossTerms
    from torch import Tensor


class DistillLoss(Protocol):
    """Compares what a student and a teacher say about the same tokens.

    ``mb_distill.testing.check_loss`` tells whether an implementation keeps the promises below.
    """

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None
    ) -> LossTerms:
        """Return the loss summed over tokens, and how many tokens it covers.

        Zero where both say the same and positive elsewhere; a constant added to all logits of a
        token changes nothing; the sums of the parts of a batch add up to the sum of the batch; no
        gradient reaches the teacher.

        Args:
            student_logits: ``[..., V]``.
            teacher_logits: ``[..., V]``, the same shape.
            mask: ``[...]``, True or non-zero where a token counts; None for all.
        """
        ...
