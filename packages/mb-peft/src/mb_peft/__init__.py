# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters for linears, in the Hugging Face PEFT format on disk."""

from mb_peft.__about__ import __version__
from mb_peft.errors import PeftError
from mb_peft.hf_format import load_hf_adapter, save_hf_adapter
from mb_peft.inject import inject, remove
from mb_peft.interfaces import LinearFactory
from mb_peft.lora import LoRALinear, adapters, disabled
from mb_peft.merge import merge, unmerge
from mb_peft.report import Adapted, Report
from mb_peft.torch_linear import TorchLinears

__all__ = [
    "Adapted",
    "LinearFactory",
    "LoRALinear",
    "PeftError",
    "Report",
    "TorchLinears",
    "__version__",
    "adapters",
    "disabled",
    "inject",
    "load_hf_adapter",
    "merge",
    "remove",
    "save_hf_adapter",
    "unmerge",
]
