# SPDX-License-Identifier: Apache-2.0
"""Between models of this engine and folders in the Hugging Face format."""

from mb_engine.bridge.checkpoints import export_hf, import_hf
from mb_engine.bridge.config import config_from_hf, config_to_hf
from mb_engine.bridge.errors import (
    BridgeError,
    HubFormatError,
    MappingError,
    UnknownFamilyError,
)
from mb_engine.bridge.family import Family, Part, families
from mb_engine.bridge.live import export_model, load_hf, stream_hf
from mb_engine.bridge.mapping import Rule

__all__ = [
    "BridgeError",
    "Family",
    "HubFormatError",
    "MappingError",
    "Part",
    "Rule",
    "UnknownFamilyError",
    "config_from_hf",
    "config_to_hf",
    "export_hf",
    "export_model",
    "families",
    "import_hf",
    "load_hf",
    "stream_hf",
]
