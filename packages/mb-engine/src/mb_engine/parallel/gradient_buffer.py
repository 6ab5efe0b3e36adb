# SPDX-License-Identifier: Apache-2.0
"""Gradients that are written where megatron-core keeps them: in one buffer a model chunk."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn


class BufferedDataParallel(DistributedDataParallel):  # type: ignore[misc]
    """``DistributedDataParallel`` that lets autograd add into its gradient buffer.

    Megatron-core has autograd make each gradient anew and adds it to the buffer in a hook, which
    is a call into Python a parameter. Where both have one dtype and no gradient is sent off before
    the others are there, the parameter's ``grad`` can be its part of the buffer from the start.
    """

    def zero_grad_buffer(self) -> None:
        """Set all gradients to zero and let the next backward pass add to them."""
        super().zero_grad_buffer()
        for parameter, place in self._places:
            parameter.grad = place

    @functools.cached_property
    def _places(self) -> list[tuple[Any, Tensor]]:
        """Parameters and their parts of the buffer."""
        return [(p, p.main_grad) for p in self.params_with_grad if self._takes_gradient_as_is(p)]

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        """Have all gradients summed over the data-parallel ranks, if there is another one.

        Megatron-core reduces over a single rank as well; gloo hands that to another thread.
        """
        if not self._is_alone():
            super().finish_grad_sync(force_all_reduce=force_all_reduce)

    def _is_alone(self) -> bool:
        settings = self.ddp_config
        groups = (self.dp_cp_group, self.expt_dp_group)
        return all(group.size() == 1 for group in groups) and not (
            settings.use_distributed_optimizer
            or settings.overlap_grad_reduce
            or settings.check_for_nan_in_grad
            or settings.check_for_large_grads
        )

    def _make_backward_post_hook(self, param: nn.Parameter) -> Callable[..., None]:
        add_to_buffer: Callable[..., None] = super()._make_backward_post_hook(param)
        if not self._takes_gradient_as_is(param):
            return add_to_buffer

        def add_unless_there(*arguments: Any) -> None:
            # Somebody may have set the gradient to None since the buffer was set to zero.
            if param.grad is not param.main_grad:  # type: ignore[attr-defined]
                add_to_buffer(*arguments)

        return add_unless_there

    def _takes_gradient_as_is(self, parameter: Any) -> bool:
        config = self.config
        return (
            # Transformer Engine, fused accumulation and CUDA graphs write gradients themselves.
            getattr(config, "transformer_impl", "local") == "local"
            and not getattr(config, "gradient_accumulation_fusion", False)
            and getattr(config, "cuda_graph_impl", "none") == "none"
            and not self.ddp_config.overlap_grad_reduce
            and not self.ddp_config.delay_wgrad_compute
            and parameter.main_grad.dtype == parameter.dtype
            and parameter.main_grad.shape == parameter.shape
        )


def finalize_data_parallel(
    model: Sequence[Any],
    num_tokens: Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool = False,
) -> None:
    """Reduce gradients over data-parallel ranks and divide them by the tokens of the global batch.

    What ``finalize_model_grads`` does for a dense model on one pipeline stage and one
    tensor-parallel rank; more it would walk all modules for, and talk to groups of one rank.

    Args:
        model: Model chunks in a :class:`BufferedDataParallel` each.
        num_tokens: 0-d integer, tokens on this rank; None where gradients are means already.
        pg_collection: Not needed.
        force_all_reduce: Do not scatter, even with the distributed optimizer.
    """
    del pg_collection
    for chunk in model:
        chunk.finish_grad_sync(force_all_reduce=force_all_reduce)
    if num_tokens is None:
        return
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        torch.distributed.all_reduce(num_tokens, group=group)
    scale = 1.0 / num_tokens.clamp(min=1)
    for chunk in model:
        chunk.scale_gradients(scale)
