# SPDX-License-Identifier: Apache-2.0
"""Keeping two jobs from saving in one place."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mb_ckpt.errors import CheckpointError
from mb_ckpt.format.tensorstore_io import get, put

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LOG = logging.getLogger("mb_ckpt")
PATIENCE_S = 5.0
"""How long to wait for a lock: children of a job that was killed hold it until they end as well."""
_CLAIM = "writer.json"


class DirectoryClaim:
    """An advisory lock on a directory, which is made if need be.

    It belongs to this process and its forks, and goes with the last of them. Where the file system
    has no locks, that is logged.

    Raises:
        CheckpointError: If another process has it.
        OSError: If the directory cannot be made or opened.
    """

    _handle = -1

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(root, os.O_RDONLY)
        end = time.monotonic() + PATIENCE_S
        while not self._locked(root):
            if time.monotonic() > end:
                self.release()
                raise CheckpointError(
                    f"another process is saving in {root}: let each job save in a directory of its "
                    "own, or end the other one first"
                )
            time.sleep(0.1)

    def check(self) -> None:
        """See `Claim.check`: the kernel takes no lock away."""

    def release(self) -> None:
        """See `Claim.release`."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        """Let others in when the store that had it was dropped without being closed."""
        self.release()

    def _locked(self, root: Path) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as e:
            _LOG.warning("cannot lock %s (%s): make sure that only one job saves there", root, e)
        return True


class PrefixClaim:
    """This writer's name at the root of a key-value store; the newest one counts."""

    def __init__(self, kvstore: Mapping[str, Any], url: str) -> None:
        self._kvstore = kvstore
        self._url = url
        self._id = uuid.uuid4().hex
        who = {
            "id": self._id,
            "host": platform.node(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        put(kvstore, _CLAIM, json.dumps(who).encode())

    def check(self) -> None:
        """See `Claim.check`."""
        found = json.loads(get(self._kvstore, _CLAIM) or b"{}")
        if found.get("id") != self._id:
            raise CheckpointError(
                f"process {found.get('pid')} on {found.get('host')} is saving in {self._url} since "
                f"{found.get('since')}: let each job save in a place of its own"
            )

    def release(self) -> None:
        """See `Claim.release`: the name stays, and stops nobody."""
