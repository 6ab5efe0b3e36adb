# SPDX-License-Identifier: Apache-2.0
"""Distributed, resharding, atomically committed checkpoints on tensorstore."""

from mb_ckpt.__about__ import __version__
from mb_ckpt.errors import CheckpointBusyError, CheckpointError, CorruptCheckpointError
from mb_ckpt.inspection import StepInfo, TensorInfo, Verified
from mb_ckpt.saver import SaveHandle
from mb_ckpt.store import CheckpointStore

__all__ = [
    "CheckpointBusyError",
    "CheckpointError",
    "CheckpointStore",
    "CorruptCheckpointError",
    "SaveHandle",
    "StepInfo",
    "TensorInfo",
    "Verified",
    "__version__",
]
