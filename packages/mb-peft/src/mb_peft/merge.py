# SPDX-License-Identifier: Apache-2.0
"""Folding adapters into the weights beside them, and taking them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_peft.errors import PeftError
from mb_peft.lora import LoRALinear, adapters

if TYPE_CHECKING:
    from torch import nn


def merge(model: nn.Module, *, reversible: bool = True) -> int:
    """Put every adapter of *model* into its linear: the same outputs, at the cost of the linear.

    ``W = W0 + (alpha / r) B A`` is computed in float32 or wider and rounded once to the dtype of
    ``W0``. A weight that something else shares, such as an embedding, is left to that alone.
    Follow with ``remove`` to get a model without any trace of adapters.

    Args:
        model: With adapters from ``inject``.
        reversible: Keep the old weights so that ``unmerge`` restores them bit for bit.

    Returns:
        How many linears changed; those already merged are left alone.

    Raises:
        PeftError: If *model* has no adapter.
    """
    layers = [layer for layer in _some(model).values() if not layer.merged]
    for layer in layers:
        layer.merge(reversible=reversible)
    return len(layers)


def unmerge(model: nn.Module) -> int:
    """Put back the weights from before ``merge``, bit for bit.

    Returns:
        How many linears changed.

    Raises:
        PeftError: If *model* has no adapter, or one was merged with ``reversible=False``; then
            nothing has changed.
    """
    layers = {name: layer for name, layer in _some(model).items() if layer.merged}
    for name, layer in layers.items():
        if not layer.reversible:
            raise PeftError(
                f"{name} was merged with reversible=False, so its old weight is gone; load the "
                "base model again"
            )
    for layer in layers.values():
        layer.unmerge()
    return len(layers)


def _some(model: nn.Module) -> dict[str, LoRALinear]:
    found = adapters(model)
    if not found:
        raise PeftError("the model has no adapters; inject(model, LoRA(...)) puts them in")
    return found
