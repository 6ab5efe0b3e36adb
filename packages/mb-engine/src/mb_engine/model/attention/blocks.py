# SPDX-License-Identifier: Apache-2.0
"""Kernels that attend to a part of the keys and say how much weight that part has.

Each is two passes: forward gives the output and the log-sum-exp of the scores, with which outputs of
several parts are merged; backward takes the merged ones and gives the gradients through its part.
Source: Dao 2023, arXiv:2307.08691, section 3.1.

Shape suffixes, all local to the rank: S = query tokens, T = key tokens, B = micro-batch,
N = query heads, G = key and value heads, D = width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import frozen

from mb_engine.errors import EngineError
from mb_engine.model.attention.exact import exact_backward, exact_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mb_engine.model.attention.packed import Segments
    from mb_engine.model.attention.scoring import Scoring

# Torch names its kernels as if they were private; their schemas are kept for exported programs.
_ATEN = torch.ops.aten
_CPU_FORWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
_CPU_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
_FLASH_FORWARD = _ATEN._flash_attention_forward  # noqa: SLF001
_FLASH_BACKWARD = _ATEN._flash_attention_backward  # noqa: SLF001
_HALVES = (torch.float16, torch.bfloat16)
_WIDEST = 256
_WIDTH_STEP = 8


@frozen(kw_only=True)
class BlockKernel:
    """Both passes of one kernel.

    Attributes:
        forward: ``(q [S, B, N, D], k [T, B, G, D], v [T, B, G, D], scoring, segments)`` to output
            ``[S, B, N, D]`` and log-sum-exp ``[B, N, S]``. Where causal, S equals T. *segments* is
            None or says which rows of a packed row (B = 1) belong together.
        backward: ``(grad, q, k, v, output, log-sum-exp, scoring, segments)`` to the gradients of q,
            k and v.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def block_kernel(q_SBND: Tensor, scoring: Scoring, backend: str) -> BlockKernel:
    """Return the kernel for queries like *q_SBND*.

    Args:
        q_SBND: Its device, dtype and width decide.
        scoring: Capped scores go to the exact kernel.
        backend: ``auto``, ``flash``, ``unfused`` or ``local``; ``fused`` has no such kernel.

    Raises:
        EngineError: If *backend* cannot compute it.
    """
    flash = None
    if scoring.cap is None:
        if q_SBND.device.type == "cpu":
            flash = CPU_FLASH
        elif flash_fits(q_SBND):
            flash = CUDA_FLASH
    if backend == "fused" or (backend == "flash" and flash is None):
        what = "capped scores" if scoring.cap else f"{q_SBND.dtype} on {q_SBND.device.type}"
        raise EngineError(
            f"model.attention_backend={backend}: it gives no log-sum-exp for {what}, which"
            " cp_comm_type=p2p needs; use model.attention_backend=auto, or cp_comm_type=all_gather"
        )
    return flash if flash is not None and backend in {"auto", "flash"} else EXACT


def flash_fits(x: Tensor) -> bool:
    """Return whether the flash kernel of CUDA takes heads like these."""
    width = x.size(-1)
    return x.is_cuda and x.dtype in _HALVES and width <= _WIDEST and width % _WIDTH_STEP == 0


def _by_segment(
    forward: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Let a forward pass go over segments one after the other."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, segments: Segments | None
    ) -> tuple[Tensor, Tensor]:
        if segments is None:
            return forward(q, k, v, scoring)
        runs = zip(
            q.split_with_sizes(segments.queries),
            k.split_with_sizes(segments.keys),
            v.split_with_sizes(segments.keys),
            strict=True,
        )
        outputs, sums = zip(*(forward(*run, scoring) for run in runs), strict=True)
        return torch.cat(outputs), torch.cat(sums, dim=-1)

    return run


def _by_segment_back(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Let a backward pass go over segments one after the other."""

    def run(  # noqa: PLR0917 - as autograd has them
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scoring: Scoring,
        segments: Segments | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if segments is None:
            return backward(grad, q, k, v, out, lse, scoring)
        of_queries = [x.split_with_sizes(segments.queries) for x in (grad, q)]
        of_keys = [x.split_with_sizes(segments.keys) for x in (k, v)]
        sums = lse.split_with_sizes(segments.queries, dim=-1)
        runs = zip(*of_queries, *of_keys, out.split_with_sizes(segments.queries), sums, strict=True)
        dq, dk, dv = zip(*(backward(*run, scoring) for run in runs), strict=True)
        return torch.cat(dq), torch.cat(dk), torch.cat(dv)

    return run


def _heads_first(x_SBND: Tensor) -> Tensor:
    return x_SBND.permute(1, 2, 0, 3)


def _tokens_first(x_BNSD: Tensor) -> Tensor:
    return x_BNSD.permute(2, 0, 1, 3)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    q, k, v = map(_heads_first, (q, k, v))
    out, lse = _CPU_FORWARD(q, k, v, 0.0, scoring.causal, scale=scoring.scale)
    return _tokens_first(out), lse


def _cpu_backward(  # noqa: PLR0917 - as autograd has them
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = map(_heads_first, (grad, q, k, v, out))
    # The kernel reads the sums as it wrote them: tokens before heads.
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    grads = _CPU_BACKWARD(grad, q, k, v, out, lse, 0.0, scoring.causal, scale=scoring.scale)
    dq, dk, dv = map(_tokens_first, grads)
    return dq, dk, dv


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    laid_out, bounds = _cuda_layout(q, k, segments)
    out, lse, *_ = _FLASH_FORWARD(
        *map(laid_out, (q, k, v)), *bounds, 0.0, scoring.causal, False, scale=scoring.scale
    )
    return _from_cuda(out, segments), lse if segments is None else lse.unsqueeze(0)


def _cuda_backward(  # noqa: PLR0917 - as autograd has them
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scoring: Scoring,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor]:
    laid_out, bounds = _cuda_layout(q, k, segments)
    # Without dropout the random state is not read.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = _FLASH_BACKWARD(
        *map(laid_out, (grad, q, k, v, out)),
        (lse if segments is None else lse.squeeze(0)).contiguous(),
        *bounds,
        0.0,
        scoring.causal,
        state,
        torch.empty(0, device=q.device),
        scale=scoring.scale,
    )
    dq, dk, dv = (_from_cuda(x, segments) for x in grads)
    return dq, dk, dv


def _batch_first(x_SBND: Tensor) -> Tensor:
    return x_SBND.transpose(0, 1)


def _without_batch(x_S1ND: Tensor) -> Tensor:
    return x_S1ND.squeeze(1)


def _cuda_layout(
    q: Tensor, k: Tensor, segments: Segments | None
) -> tuple[Callable[[Tensor], Tensor], tuple[object, ...]]:
    """Return how the kernel wants its tensors laid out, and where runs of tokens begin and end."""
    if segments is None:
        return _batch_first, (None, None, q.size(0), k.size(0))
    longest = max(segments.queries), max(segments.keys)
    return _without_batch, (segments.cu_queries, segments.cu_keys, *longest)


def _from_cuda(x: Tensor, segments: Segments | None) -> Tensor:
    return x.transpose(0, 1) if segments is None else x.unsqueeze(1)


CPU_FLASH = BlockKernel(forward=_by_segment(_cpu_forward), backward=_by_segment_back(_cpu_backward))
CUDA_FLASH = BlockKernel(forward=_cuda_forward, backward=_cuda_backward)
EXACT = BlockKernel(forward=_by_segment(exact_forward), backward=_by_segment_back(exact_backward))
