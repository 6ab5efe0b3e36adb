# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a checkpoint, each in one line that says what to do."""

from __future__ import annotations

import errno

from mb_config.errors import UserError


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, found or read."""


class CheckpointBusyError(CheckpointError):
    """A save was refused because an earlier one is still being written."""


class CorruptCheckpointError(CheckpointError):
    """Stored bytes are not what was written: a bit flipped, a file is short or missing."""


def storage_error(action: str, error: Exception) -> CheckpointError:
    """Return *error*, from the operating system or tensorstore, as one clear line.

    Args:
        action: What was being done, such as ``"writing step 10 to /ckpt"``.
        error: What came back.
    """
    code = getattr(error, "errno", None)
    text = str(error).split(" [tensorstore_spec=", maxsplit=1)[0].replace("\n", " ")
    remedy = "check that the storage is well"
    if code == errno.ENOSPC or "RESOURCE_EXHAUSTED" in text or "No space left" in text:
        return CheckpointError(f"disk full while {action}: free space and save again ({text})")
    if code == errno.EFBIG or "File too large" in text:
        remedy = "raise the file size limit (ulimit -f)"
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS) or "PERMISSION_DENIED" in text:
        remedy = "check the permissions of the directory"
    return CheckpointError(f"{action} failed: {text}; {remedy}")
