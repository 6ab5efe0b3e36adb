# SPDX-License-Identifier: Apache-2.0
"""The training engine on megatron-core: CPU over gloo and CUDA over NCCL, one code path.

Importing this package imports neither torch nor megatron-core; the names below do when first used,
because the CPU runtime has to be in place before megatron-core is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mb_engine.__about__ import __version__
from mb_engine.errors import CheckpointMismatchError, EngineError, NumericsError

if TYPE_CHECKING:
    from mb_engine.compose import Components
    from mb_engine.train.engine import Engine
    from mb_engine.train.entry import RunResult, finetune, generate_text, pretrain
    from mb_engine.train.objective import LanguageModelObjective
    from mb_engine.train.outcome import OptimizerStep

__all__ = [
    "CheckpointMismatchError",
    "Components",
    "Engine",
    "EngineError",
    "LanguageModelObjective",
    "NumericsError",
    "OptimizerStep",
    "RunResult",
    "__version__",
    "finetune",
    "generate_text",
    "pretrain",
]

_HOMES = {
    "Components": "compose",
    "Engine": "train.engine",
    "LanguageModelObjective": "train.objective",
    "OptimizerStep": "train.outcome",
    "RunResult": "train.entry",
    "finetune": "train.entry",
    "generate_text": "train.entry",
    "pretrain": "train.entry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mb_engine' has no attribute {name!r}")
    return getattr(import_module(f"mb_engine.{_HOMES[name]}"), name)
