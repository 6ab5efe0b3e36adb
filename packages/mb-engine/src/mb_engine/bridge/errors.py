# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a folder in the Hugging Face format, or with what is to become one."""

from __future__ import annotations

from mb_engine.errors import EngineError


class BridgeError(EngineError):
    """A folder that cannot be read, or a model that cannot be written, in the Hugging Face format."""


class HubFormatError(BridgeError):
    """A file of such a folder is missing or damaged."""


class MappingError(BridgeError):
    """Tensors on disk and parameters of the model that do not belong together."""


class UnknownFamilyError(BridgeError):
    """An architecture for which there is no mapping."""
