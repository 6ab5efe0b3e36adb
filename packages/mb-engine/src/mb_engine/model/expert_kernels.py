# SPDX-License-Identifier: Apache-2.0
"""Which kernels of experts need more than torch, and whether it is there."""

from __future__ import annotations

import importlib
from typing import Any

from mb_engine.errors import EngineError

_OF_TRANSFORMER_ENGINE = {
    "moe_grouped_gemm": "the torch layer spec multiplies one expert after the other",
    "moe_permute_fusion": "its kernel is Transformer Engine's",
    "moe_router_fusion": "its kernels are Transformer Engine's",
}
_FLEX_KERNELS = {"deepep": ("HAVE_DEEP_EP", "DeepEP"), "hybridep": ("HAVE_HYBRIDEP", "HybridEP")}


def check_expert_kernels(config: Any, *, layer_spec: str) -> None:
    """Refuse what the experts of *config* cannot run here.

    Args:
        config: Megatron-core's ``TransformerConfig``.
        layer_spec: ``"torch"`` or ``"te"``.

    Raises:
        EngineError: If a kernel needs the te layer spec or a package that is not installed.
    """
    if config.num_moe_experts is None:
        return
    for name, why in _OF_TRANSFORMER_ENGINE.items():
        if getattr(config, name) and layer_spec == "torch":
            raise EngineError(
                f"model.{name}=True needs Transformer Engine: {why}; set it to false, or"
                " model.layer_spec=te on a machine with CUDA"
            )
    if config.moe_token_dispatcher_type == "flex":  # noqa: S105 - no password
        backend = config.moe_flex_dispatcher_backend
        flag, package = _FLEX_KERNELS[backend]
        kernels = importlib.import_module("megatron.core.transformer.moe.fused_a2a")
        if not getattr(kernels, flag):
            raise EngineError(
                f"model.moe_token_dispatcher_type=flex: its backend {backend} needs {package},"
                " which is for CUDA and not installed; use alltoall, or install deep_ep"
            )
