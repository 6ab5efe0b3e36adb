# SPDX-License-Identifier: Apache-2.0
"""``torch.compile`` where the torch layers gain from it: between their matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mb_engine.errors import EngineError
from mb_engine.model.mlp import TorchMLP, gated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


def compile_elementwise(chunks: Sequence[nn.Module], *, backend: str = "inductor") -> int:
    """Compile the activation of every dense MLP of the torch layers; return how many there are.

    The activation of the widest tensor of a layer takes two kernels forward and four backward and
    keeps two tensors; compiled it takes one each way and keeps its input alone. Matrix products,
    norms and attention are kernels already, and communication cannot be compiled.

    Args:
        chunks: Model chunks, with or without wrappers.
        backend: Of ``torch.compile``.

    Raises:
        EngineError: If there is nothing to compile.
    """
    function: Any = torch.compile(gated, backend=backend, dynamic=False)
    found = [
        module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, TorchMLP) and module.is_usual and module.config.gated_linear_unit
    ]
    if not found:
        raise EngineError(
            "model.torch_compile=True: the layers have no gated dense MLP to compile; set it to"
            " false"
        )
    for module in found:
        module.activation_of = function
    return len(found)
