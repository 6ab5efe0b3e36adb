# SPDX-License-Identifier: Apache-2.0
"""Attention among rows that are all on this rank, by the best kernel that computes it.

Shape suffixes, all local to the rank: S = query tokens, T = key tokens, B = micro-batch,
N = query heads, G = key and value heads, D = width of a query and key, E = width of a value.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.backends import cuda
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mb_engine.errors import EngineError
from mb_engine.model.attention.blocks import flash_fits
from mb_engine.model.attention.exact import exact_attention
from mb_engine.model.attention.scoring import visible_keys

if TYPE_CHECKING:
    from torch import Tensor

    from mb_engine.model.attention.packed import Segments
    from mb_engine.model.attention.scoring import Scoring

_FLASH_FORWARD = torch.ops.aten._flash_attention_forward  # noqa: SLF001
_EFFICIENT_FORWARD = torch.ops.aten._efficient_attention_forward  # noqa: SLF001
_KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "fused": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "unfused": [SDPBackend.MATH],
    "local": [SDPBackend.MATH],
}
_NOTHING = contextlib.nullcontext()
_BAND_ROWS = 256
_CAUSAL_AT_THE_END = 2


def attend(
    q_SBND: Tensor,
    k_TBGD: Tensor,
    v_TBGE: Tensor,
    scoring: Scoring,
    *,
    dropout: float = 0.0,
    hidden: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return softmax attention ``[S, B, N, E]``.

    Args:
        q_SBND: Queries, the last ones of the keys where there are fewer.
        k_TBGD: Keys; N is a multiple of G.
        v_TBGE: Values.
        scoring: From scores to probabilities.
        dropout: Part of the probabilities to drop.
        hidden: Broadcasts to ``[B, N, S, T]``; True hides a key, on top of *scoring*.
        backend: As ``model.attention_backend``.

    Raises:
        EngineError: If *backend*, or any kernel, cannot compute it on this device.
    """
    if scoring.cap is not None:
        _check_capped(dropout, hidden, backend)
        return exact_attention(q_SBND, k_TBGD, v_TBGE, scoring)
    queries, keys = q_SBND.size(0), k_TBGD.size(0)
    partial = scoring.window is not None or (scoring.causal and queries != keys)
    if partial and hidden is None:
        if backend in {"auto", "flash"} and flash_fits(q_SBND) and flash_fits(v_TBGE):
            return _flash_of_cuda(q_SBND, k_TBGD, v_TBGE, scoring, dropout)
        rows = max(_BAND_ROWS, scoring.reach[0] + 1)
        if scoring.window is not None and scoring.causal and queries > rows:
            return _in_bands(q_SBND, k_TBGD, v_TBGE, scoring, dropout, backend, rows)
    mask: Tensor | None = None
    if partial or hidden is not None:
        mask = visible_keys(
            queries, keys, causal=scoring.causal, window=scoring.window, device=q_SBND.device
        )
        if hidden is not None:
            mask = mask & ~hidden
    return _by_torch(q_SBND, k_TBGD, v_TBGE, scoring, mask, dropout, backend)


def attend_segments(
    q_S1ND: Tensor,
    k_T1GD: Tensor,
    v_T1GE: Tensor,
    scoring: Scoring,
    segments: Segments,
    *,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Return attention ``[S, 1, N, E]`` in which each run of rows attends to its own keys alone.

    On CUDA one kernel takes all runs; elsewhere, and where that kernel cannot, they are computed
    one after the other. Never is there a mask over all rows.

    Args:
        q_S1ND: Queries of all runs.
        k_T1GD: Keys of all runs.
        v_T1GE: Values of all runs.
        scoring: From scores to probabilities, in each run.
        segments: The runs.
        dropout: Part of the probabilities to drop.
        backend: As ``model.attention_backend``.

    Raises:
        EngineError: As :func:`attend`.
    """
    if q_S1ND.is_cuda and scoring.cap is None:
        same_width = q_S1ND.size(-1) == v_T1GE.size(-1)
        if backend in {"auto", "flash"} and flash_fits(q_S1ND) and same_width:
            return _flash_of_cuda(q_S1ND, k_T1GD, v_T1GE, scoring, dropout, segments)
        is_plain = scoring.window is None and q_S1ND.dtype != torch.float64
        if backend in {"auto", "fused"} and is_plain:
            return _efficient_of_cuda(q_S1ND, k_T1GD, v_T1GE, scoring, dropout, segments)
    runs = zip(
        q_S1ND.split_with_sizes(segments.queries),
        k_T1GD.split_with_sizes(segments.keys),
        v_T1GE.split_with_sizes(segments.keys),
        strict=True,
    )
    return torch.cat([attend(*run, scoring, dropout=dropout, backend=backend) for run in runs])


def _check_capped(dropout: float, hidden: Tensor | None, backend: str) -> None:
    what = None
    if dropout:
        what = f"attention_dropout={dropout}"
    elif hidden is not None:
        what = "an attention_mask"
    elif backend in {"flash", "fused"}:
        what = f"attention_backend={backend}"
    if what is not None:
        raise EngineError(
            f"model.attn_logit_softcapping has no kernel for {what}; leave one of them out"
        )


def _in_bands(  # noqa: PLR0917 - private
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    dropout: float,
    backend: str,
    rows: int,
) -> Tensor:
    """Attend some rows at a time, each to the keys that its window reaches."""
    queries, keys = q.size(0), k.size(0)
    outputs = []
    for first in range(0, queries, rows):
        end = min(first + rows, queries)
        start, stop = scoring.seen(first, end, queries=queries, keys=keys)
        mask = visible_keys(
            end - first, stop - start, causal=True, window=scoring.window, device=q.device
        )
        band = q[first:end], k[start:stop], v[start:stop]
        outputs.append(_by_torch(*band, scoring, mask, dropout, backend))
    return torch.cat(outputs)


def _by_torch(  # noqa: PLR0917 - private
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    mask: Tensor | None,
    dropout: float,
    backend: str,
) -> Tensor:
    """Attend with ``torch.nn.functional.scaled_dot_product_attention``."""
    grouped = q.size(2) != k.size(2)
    if grouped and backend == "fused":
        # These kernels want a key for every query head.
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
        grouped = False
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    causal = scoring.causal and mask is None
    chosen: contextlib.AbstractContextManager[Any] = _NOTHING
    if backend != "auto":
        _check_backend(backend, (q, k, v, mask, dropout, causal, grouped))
        chosen = sdpa_kernel(_KERNELS[backend], set_priority=True)
    with chosen:
        out_BNSE = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scoring.scale,
            enable_gqa=grouped,
        )
    return out_BNSE.permute(2, 0, 1, 3)


def _check_backend(backend: str, arguments: tuple[Any, ...]) -> None:
    """Raise unless torch has the kernel for these arguments; unfused attention always is there."""
    if backend in {"unfused", "local"}:
        return
    q, _, v, mask, dropout, *_ = arguments
    if q.is_cuda:
        params = cuda.SDPAParams(*arguments)
        there = (
            cuda.can_use_flash_attention(params)
            if backend == "flash"
            else cuda.can_use_cudnn_attention(params) or cuda.can_use_efficient_attention(params)
        )
    else:
        there = backend == "flash" and dropout == 0 and q.size(-1) == v.size(-1)
    if not there:
        extras = (
            f"attention_dropout={dropout}" if dropout else "",
            "a mask" if mask is not None else "",
        )
        what = ", ".join([str(q.dtype).removeprefix("torch."), *filter(None, extras)])
        raise EngineError(
            f"model.attention_backend={backend}: torch has no such kernel on {q.device.type} for"
            f" {what}, heads {q.size(-1)} wide; use model.attention_backend=auto"
        )


def _flash_of_cuda(  # noqa: PLR0917 - private
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    dropout: float,
    segments: Segments | None = None,
) -> Tensor:
    """Attend with the flash kernel, which takes windows, runs and queries at the end of the keys.

    Torch's own front end offers it for whole causal sequences alone.
    """
    left, right = scoring.reach
    plain = scoring.window is None
    laid_out = (x.squeeze(1) if segments is not None else x.transpose(0, 1) for x in (q, k, v))
    out, *_ = _FLASH_FORWARD(
        *laid_out,
        *_bounds(q, k, segments),
        dropout,
        scoring.causal and plain,
        False,
        scale=scoring.scale,
        window_size_left=None if plain else left,
        window_size_right=None if plain else right,
    )
    return out.unsqueeze(1) if segments is not None else out.transpose(0, 1)  # type: ignore[no-any-return]


def _efficient_of_cuda(  # noqa: PLR0917 - private
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, dropout: float, segments: Segments
) -> Tensor:
    """Attend with the memory-efficient kernel, which takes float32."""
    heads = q.size(2)
    k, v = (x.repeat_interleave(heads // x.size(2), dim=2) for x in (k, v))
    out, *_ = _EFFICIENT_FORWARD(
        *(x.transpose(0, 1) for x in (q, k, v)),
        None,
        *_bounds(q, k, segments),
        dropout,
        _CAUSAL_AT_THE_END if scoring.causal else 0,
        torch.is_grad_enabled(),
        scale=scoring.scale,
    )
    return out.transpose(0, 1)  # type: ignore[no-any-return]


def _bounds(q: Tensor, k: Tensor, segments: Segments | None) -> tuple[Any, ...]:
    """Return where runs of queries and keys begin, and how long the longest are."""
    if segments is None:
        return None, None, q.size(0), k.size(0)
    longest = max(segments.queries), max(segments.keys)
    return segments.cu_queries, segments.cu_keys, *longest
