# SPDX-License-Identifier: Apache-2.0
"""Memory for modules that were built on the ``meta`` device, right before they are filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mb_ckpt.errors import CheckpointError


@contextmanager
def materialize(state: Any, device: Any) -> Iterator[None]:
    """Give all parameters and persistent buffers on ``meta`` in modules of *state* memory.

    Tensors that were shared are shared again. If the body raises, all are on ``meta`` again.

    Args:
        state: Nested mappings and sequences.
        device: Where; None for the CPU.

    Raises:
        CheckpointError: If a module has a non-persistent buffer on ``meta``: no checkpoint has it.
    """
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    try:
        for path, root in _modules(state, ""):
            for name, module in root.named_modules():
                here = ".".join(part for part in (path, name) if part)
                _materialize_one(module, here, device or "cpu", before, made)
        yield
    except BaseException:
        for table, name, tensor in before:
            table[name] = tensor
        raise


def _modules(state: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(state, nn.Module):
        yield path, state
    elif isinstance(state, (Mapping, list, tuple)):
        items = state.items() if isinstance(state, Mapping) else enumerate(state)
        for key, value in items:
            yield from _modules(value, f"{path}.{key}" if path else str(key))


def _materialize_one(
    module: nn.Module,
    path: str,
    device: Any,
    before: list[tuple[dict[str, Any], str, Tensor]],
    made: dict[int, Tensor],
) -> None:
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)  # noqa: SLF001
    for table in tables:
        for name, tensor in table.items():
            if tensor is None or not tensor.is_meta:
                continue
            if name in module._non_persistent_buffers_set:  # noqa: SLF001
                raise CheckpointError(
                    f"buffer {path}.{name} is on meta and in no checkpoint (persistent=False): "
                    "build it on a real device"
                )
            before.append((table, name, tensor))
            if id(tensor) not in made:
                fresh: Tensor = torch.empty_like(tensor, device=device)
                if isinstance(tensor, nn.Parameter):
                    fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                made[id(tensor)] = fresh
            table[name] = made[id(tensor)]
