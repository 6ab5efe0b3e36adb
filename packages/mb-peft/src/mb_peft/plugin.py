# SPDX-License-Identifier: Apache-2.0
"""The entry point ``lora`` of ``mb.model_transforms``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from attrs import frozen

from mb_peft.inject import inject

if TYPE_CHECKING:
    from mb_config import LoRA
    from mb_config.records import ProcessLayout
    from torch import nn

logger = logging.getLogger(__name__)


@frozen
class LoRATransform:
    """Puts adapters into a model that is being set up for training.

    Attributes:
        config: Which and where.
    """

    config: LoRA

    def apply(self, model: nn.Module, layout: ProcessLayout) -> nn.Module:
        """Return *model*, changed in place; the first rank logs what will train.

        Raises:
            PeftError: As ``inject`` does.
        """
        report = inject(model, self.config)
        if layout.rank == 0:
            logger.info("adapters on %s\n%s", layout.describe(), report)
        return model

    def trainable(self, name: str) -> bool:
        """Return whether *name* is the weight of an adapter."""
        return name.endswith((".lora_a.weight", ".lora_b.weight"))


def make_transform(config: LoRA) -> LoRATransform:
    """Return the transform for the ``peft`` section of a configuration."""
    return LoRATransform(config)
