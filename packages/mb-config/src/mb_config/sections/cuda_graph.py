# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs."""

from __future__ import annotations

from typing import Literal

from attrs import define

from mb_config._fields import number
from mb_config._types import check_all, checked, concise

CudaGraphScope = Literal[
    "full_iteration", "attn", "mlp", "moe", "moe_router", "moe_preprocess", "mamba"
]


@define(kw_only=True, on_setattr=checked)
class CudaGraphConfig:
    """Capture work in CUDA graphs; names as in megatron-core.

    Attributes:
        cuda_graph_impl: Whose capture; none captures nothing.
        cuda_graph_scope: What to capture; null means whole layers.
        cuda_graph_warmup_steps: Steps before the capture.
    """

    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = "none"
    cuda_graph_scope: list[CudaGraphScope] | None = None
    cuda_graph_warmup_steps: int = number(3, ge=0)

    __attrs_post_init__ = check_all
    __repr__ = concise
