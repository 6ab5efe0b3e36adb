# SPDX-License-Identifier: Apache-2.0
"""The global gradient norm and its clipping on whole gradient buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_CHUNK = 1 << 16


def norm_of(buffers: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all elements of *buffers* together, to float32 accuracy, unread.

    On a CPU torch adds the squares of one tensor up in few float32 sums: of 3 million elements the
    norm is 6e-5 too small, of 30 million 2e-3. There it is taken in pieces.

    Args:
        buffers: Float32, one-dimensional, on one device.
    """
    pieces = [p for b in buffers for p in (torch.split(b, _CHUNK) if b.is_cpu else (b,))]
    norms = torch._foreach_norm(pieces)  # noqa: SLF001 - there is no other name of it
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


class BufferedOptimizer(ChainedOptimizer):  # type: ignore[misc]
    """Float32 optimizers that take norms of the buffers in which all their gradients lie.

    Megatron-core collects the gradients that count, then takes a norm and a scaling of each. Where
    no gradient is a copy of another rank's, the norm of the buffers is the same number.
    """

    def __init__(self, optimizers: Sequence[Any], buffers: Sequence[Tensor]) -> None:
        """Take over *optimizers*.

        Args:
            optimizers: ``FP32Optimizer`` each.
            buffers: Float32, one-dimensional; the gradients of all parameters and zeros.
        """
        super().__init__(list(optimizers))
        self.buffers = tuple(buffers)

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Return the L2 norm of all gradients; waits for the device."""
        return float(norm_of(self.buffers))

    @torch.no_grad()
    def step(self) -> tuple[bool, float, float | None]:
        """Clip the gradients to ``clip_grad`` if it is positive, and update the parameters.

        Returns:
            Whether the parameters were updated, which they always are; the norm before clipping;
            the number of zeros among the gradients, None unless ``log_num_zeros_in_grad``.
        """
        self.prepare_grads()
        norm = self.get_grad_norm()
        limit = self.config.clip_grad
        if limit > 0.0:
            # As torch and megatron-core do, the small number keeps a norm of 0 from dividing.
            coefficient = limit / (norm + 1.0e-6)
            if coefficient < 1.0:
                for buffer in self.buffers:
                    buffer.mul_(coefficient)
        zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        return self.step_with_ready_grads(), norm, zeros


def use_buffers(optimizer: Any, chunks: Sequence[Any]) -> Any:
    """Return *optimizer*, or one that does the same on whole buffers where that is possible.

    Args:
        optimizer: From ``get_megatron_optimizer``.
        chunks: This rank's model chunks, wrapped for data parallelism.
    """
    from megatron.core import parallel_state

    if any(chunk.ddp_config.use_megatron_fsdp for chunk in chunks):
        return optimizer
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    in_buffers = {id(parameter) for buffer in buffers for parameter in buffer.params}
    in_optimizer = {
        id(parameter)
        for one in inner
        for group in one.param_groups
        for parameter in group["params"]
    }
    possible = (
        # Not its subclasses, nor optimizers with main parameters of their own.
        all(type(one) is FP32Optimizer and not one.is_stub_optimizer for one in inner)
        # Over model-parallel ranks there are replicas, which must count once.
        and parallel_state.get_model_parallel_group().size() == 1
        and in_buffers == in_optimizer
        and len(buffers) > 0
        and all(buffer.grad_dtype == torch.float32 for buffer in buffers)
    )
    if not possible:
        return optimizer
    return BufferedOptimizer(inner, [buffer.grad_data for buffer in buffers])
