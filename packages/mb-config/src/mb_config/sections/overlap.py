# SPDX-License-Identifier: Apache-2.0
"""Overlap of communication with computation, beside the data-parallel one in ``ddp``."""

from __future__ import annotations

from typing import Literal

from attrs import define

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class CommOverlapConfig:
    """Overlap within tensor, pipeline and expert parallelism; names as in megatron-core.

    Attributes:
        tp_comm_overlap: Overlap tensor-parallel communication with GEMMs (TE, sequence parallel).
        tp_comm_overlap_cfg: Settings of user buffers by GEMM, such as ``qkv_fprop``, as Transformer
            Engine takes them; null means its own.
        tp_comm_bootstrap_backend: Backend that sets the user buffers up.
        tp_comm_overlap_rs_dgrad: Overlap the reduce-scatter of activation gradients.
        overlap_p2p_comm: Overlap pipeline sends and receives; null means on with virtual stages.
        batch_p2p_comm: Batch pipeline sends and receives; null means where they do not overlap.
        defer_embedding_wgrad_compute: Put the embedding's weight gradient into the pipeline's idle
            time.
        wgrad_deferral_limit: Micro-batches whose embedding gradient is deferred; 0 means all.
        overlap_moe_expert_parallel_comm: Overlap expert dispatch with computation.
        delay_wgrad_compute: Split weight gradients off, to overlap them, too.
    """

    tp_comm_overlap: bool = False
    tp_comm_overlap_cfg: dict[str, dict[str, int | bool | str]] | None = None
    tp_comm_bootstrap_backend: Literal["nccl", "mpi", "gloo"] = "nccl"
    tp_comm_overlap_rs_dgrad: bool = False
    overlap_p2p_comm: bool | None = None
    batch_p2p_comm: bool | None = None
    defer_embedding_wgrad_compute: bool = False
    wgrad_deferral_limit: int = number(0, ge=0)
    overlap_moe_expert_parallel_comm: bool = False
    delay_wgrad_compute: bool = False

    __attrs_post_init__ = check_all
    __repr__ = concise
