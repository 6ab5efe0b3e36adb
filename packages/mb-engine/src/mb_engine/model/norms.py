# SPDX-License-Identifier: Apache-2.0
"""Norms on torch's own kernels, with the marks that megatron-core's gradients need.

Under sequence parallelism each tensor-parallel rank sees a part of the tokens, so the gradient of a
norm's weight must be summed over these ranks. Megatron-core does so for parameters that carry the
attribute ``sequence_parallel``.

Shape suffixes: H = normalized width; a leading ``x`` has any further dimensions.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from mb_engine.model.autograd import first_order

if TYPE_CHECKING:
    from torch import Tensor


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4, with ``eps`` added to the mean square.
    Statistics are taken in float32; the result has the dtype of the weight.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_kwargs: Any) -> None:
        """Take what megatron-core gives to every norm.

        Args:
            config: Megatron-core's ``TransformerConfig``.
            hidden_size: H.
            eps: Added to the mean square.
        """
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        self.zero_centered = bool(config.layernorm_zero_centered_gamma)
        self.weight = _parameter(config, self.shape, value=0.0 if self.zero_centered else 1.0)

    def forward(self, x_H: Tensor) -> Tensor:
        """Return the normalized input, same shape."""
        weight_H = self.weight + 1 if self.zero_centered else self.weight
        if x_H.dtype == weight_H.dtype:
            if x_H.dtype == torch.float32 and not x_H.is_cuda:
                out_H: Tensor = _RMSNormOnCPU.apply(  # type: ignore[no-untyped-call]
                    x_H, weight_H, self.eps
                )
                return out_H
            return functional.rms_norm(x_H, self.shape, weight_H, self.eps)
        # A float32 residual stream with 16-bit weights.
        return functional.rms_norm(x_H, self.shape, weight_H.to(x_H.dtype), self.eps).to(
            weight_H.dtype
        )


class LayerNorm(nn.Module):
    """``(x - mean(x)) / std(x) * weight + bias`` over the last dimension.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, with ``eps`` added to the variance.
    Statistics are taken in float32; the result has the dtype of the weight.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_kwargs: Any) -> None:
        """Take what megatron-core gives to every norm.

        Args:
            config: Megatron-core's ``TransformerConfig``.
            hidden_size: H.
            eps: Added to the variance.
        """
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        self.zero_centered = bool(config.layernorm_zero_centered_gamma)
        self.weight = _parameter(config, self.shape, value=0.0 if self.zero_centered else 1.0)
        self.bias = _parameter(config, self.shape, value=0.0)

    def forward(self, x_H: Tensor) -> Tensor:
        """Return the normalized input, same shape."""
        weight_H = self.weight + 1 if self.zero_centered else self.weight
        bias_H = self.bias
        if x_H.dtype == weight_H.dtype:
            return functional.layer_norm(x_H, self.shape, weight_H, bias_H, self.eps)
        return functional.layer_norm(
            x_H, self.shape, weight_H.to(x_H.dtype), bias_H.to(x_H.dtype), self.eps
        ).to(weight_H.dtype)


def norm_class(normalization: str) -> type[nn.Module]:
    """Return the norm that megatron-core's ``normalization`` names."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[normalization]


class _RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm in float32 with as few passes over the input as torch's own kernels allow.

    Torch has a fused kernel on CUDA only; on a CPU it composes the norm of six operations and lets
    autograd differentiate each, which took 1.8 times as long at H = 256 and 1.4 at H = 64.

    With ``n = x / rms(x)``: ``dx = (g - n * mean(g * n)) / rms(x)`` for ``g = dy * weight``, and
    ``dweight = sum(dy * n)``.
    """

    @staticmethod
    def forward(ctx: Any, x_H: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Return the normalized input and keep it without the weight."""
        length = torch.linalg.vector_norm(x_H, dim=-1, keepdim=True)
        mean_square = torch.addcmul(_scalar(eps), length, length, value=1.0 / x_H.size(-1))
        inverse = mean_square.rsqrt_()
        normalized_H: Tensor = x_H * inverse
        ctx.save_for_backward(normalized_H, inverse, weight_H)
        return normalized_H * weight_H

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_H: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradients of input and weight."""
        normalized_H, inverse, weight_H = ctx.saved_tensors
        width = weight_H.size(0)
        by_token = (grad_H * normalized_H).reshape(-1, width)
        total = torch.mv(by_token, weight_H).view_as(inverse)
        along = torch.addcmul(grad_H * weight_H, normalized_H, total, value=-1.0 / width)
        grad_x_H = along.mul_(inverse)
        return grad_x_H, by_token.sum(0) if ctx.needs_input_grad[1] else None, None


@functools.lru_cache(maxsize=16)
def _scalar(value: float) -> Tensor:
    """Return *value* as a float32 tensor; kernels take a tensor faster than a Python number."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _parameter(config: Any, shape: tuple[int, ...], *, value: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.full(shape, value, dtype=config.params_dtype))
    # Not a torch attribute: megatron-core looks for it, see the head of this module.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter
