# SPDX-License-Identifier: Apache-2.0
"""What an optimizer step came to."""

from __future__ import annotations

from attrs import frozen


@frozen(kw_only=True)
class OptimizerStep:
    """The outcome of one optimizer step.

    Attributes:
        updated: False where the update was skipped because a gradient overflowed.
        grad_norm: Global L2 norm before clipping; None where clipping is off or the step skipped.
        num_zeros: Zero entries among the gradients, None unless asked for.
        learning_rate: Used for this step.
        weight_decay: Used for this step.
        loss_scale: Used for this step; 1.0 without loss scaling.
    """

    updated: bool
    grad_norm: float | None
    num_zeros: int | None
    learning_rate: float
    weight_decay: float
    loss_scale: float
