# SPDX-License-Identifier: Apache-2.0
"""What the hand-written gradients of this package share."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a ``backward`` refuse a gradient of its gradient, which it would get wrong in silence.

    As torch's ``once_differentiable``, whose two context managers cost as much as a small kernel.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise EngineError(
                "the torch layer spec has first derivatives only: call backward without"
                " create_graph, or use model.layer_spec=te"
            )
        return backward(ctx, *grads)

    return guarded
