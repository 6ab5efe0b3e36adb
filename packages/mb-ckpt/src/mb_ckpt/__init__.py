# SPDX-License-Identifier: Apache-2.0
"""Distributed, resharding, atomically committed checkpoints on tensorstore."""

from mb_ckpt.__about__ import __version__
from mb_ckpt.comparison import Changed, Comparison
from mb_ckpt.errors import CheckpointBusyError, CheckpointError, CorruptCheckpointError
from mb_ckpt.inspection import StepInfo, TensorInfo, Verified
from mb_ckpt.interop.exporting import Exported, export_checkpoint
from mb_ckpt.interop.importing import Imported, import_checkpoint
from mb_ckpt.loading.matching import Loaded
from mb_ckpt.places.retention import Best
from mb_ckpt.saving.saver import SaveHandle
from mb_ckpt.store import CheckpointStore

__all__ = [
    "Best",
    "Changed",
    "CheckpointBusyError",
    "CheckpointError",
    "CheckpointStore",
    "Comparison",
    "CorruptCheckpointError",
    "Exported",
    "Imported",
    "Loaded",
    "SaveHandle",
    "StepInfo",
    "TensorInfo",
    "Verified",
    "__version__",
    "export_checkpoint",
    "import_checkpoint",
]
