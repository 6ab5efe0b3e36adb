# SPDX-License-Identifier: Apache-2.0
"""Copying committed steps from a fast place to a second one, behind training."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from mb_ckpt.errors import CheckpointError, storage_error
from mb_ckpt.format.manifest import MANIFEST, check
from mb_ckpt.format.tensorstore_io import get
from mb_ckpt.places import catalogue
from mb_ckpt.places.catalogue import step_name
from mb_ckpt.places.commit import prepare
from mb_ckpt.places.retention import Retention, prune

if TYPE_CHECKING:
    from mb_ckpt.interfaces import Claim, Store
    from mb_ckpt.ranks import Ranks

_LOG = logging.getLogger("mb_ckpt")


class Replicator:
    """Copies steps file by file, in order, each rank its share of the files.

    A step that has been overtaken by a newer one when its turn comes is left out. The manifest
    comes last, so the second place never shows half a step.

    Args:
        source: The fast place, which every rank sees.
        target: The second place.
        ranks: Those that save together; only this thread talks over them.
        retention: What to keep in the second place.
    """

    def __init__(self, source: Store, target: Store, ranks: Ranks, retention: Retention) -> None:
        self._source = source
        self._target = target
        self._ranks = ranks
        self._retention = retention
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mb-ckpt-copy")
        self._lock = threading.Lock()
        self._waiting: list[int] = []
        self._claim: Claim | None = None

    def start(self, step: int) -> Future[bool]:
        """Begin to copy *step*, just committed; the result says whether it was not left out."""
        with self._lock:
            self._waiting.append(step)
        return self._thread.submit(self._run, step)

    def pending(self) -> tuple[int, ...]:
        """Return the steps that the source must keep until they are copied."""
        with self._lock:
            return tuple(self._waiting)

    def close(self) -> None:
        """Wait for all copies."""
        self._thread.shutdown(wait=True)
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _run(self, step: int) -> bool:
        try:
            overtaken = self._ranks.from_first(lambda: max(self.pending()) > step)
            if not overtaken:
                self._copy(step)
        except CheckpointError as e:
            if self._ranks.rank == 0:
                _LOG.error("copying step %d to %s failed: %s", step, self._target.url, e)
            raise
        finally:
            with self._lock:
                self._waiting.remove(step)
        return not overtaken

    def _copy(self, step: int) -> None:
        files, manifest = self._ranks.from_first(lambda: self._begin(step))
        error = ""
        try:
            for path in files[self._ranks.rank :: self._ranks.size]:
                self._copy_file(f"{step_name(step)}/{path}")
        except (OSError, ValueError, CheckpointError) as e:
            error = str(storage_error(f"copying step {step} to {self._target.url}", e))
        failed = [text for text in self._ranks.gather(error) if text]
        self._ranks.from_first(lambda: self._finish(step, manifest, failed))

    def _begin(self, step: int) -> tuple[list[str], bytes]:
        try:
            if self._claim is None:
                self._claim = self._target.claim()
            self._claim.check()
            prepare(self._target)
            name = step_name(step)
            raw = get(self._source.kvstore, f"{name}/{MANIFEST}") or b""
            check(raw, catalogue.where(self._source, step))
            files = [path for path in self._source.files(name) if path != MANIFEST]
        except (OSError, ValueError) as e:
            raise storage_error(f"copying step {step} to {self._target.url}", e) from e
        return files, raw

    def _copy_file(self, path: str) -> None:
        data = get(self._source.kvstore, path)
        if data is None:
            raise CheckpointError(f"{self._source.url}/{path} is gone")
        self._target.publish(path, data)

    def _finish(self, step: int, manifest: bytes, failed: list[str]) -> None:
        try:
            _refuse_if(failed)
            if self._claim is not None:
                self._claim.check()
            self._target.publish(f"{step_name(step)}/{MANIFEST}", manifest)
        except (OSError, ValueError) as e:
            self._discard(step)
            raise storage_error(f"copying step {step} to {self._target.url}", e) from e
        except CheckpointError:
            self._discard(step)
            raise
        try:
            prune(self._target, self._retention, step)
        except (OSError, ValueError, CheckpointError) as e:
            _LOG.warning("could not delete old steps in %s: %s", self._target.url, e)

    def _discard(self, step: int) -> None:
        try:
            if MANIFEST not in self._target.names(step_name(step)):
                self._target.remove(step_name(step))
        except (OSError, ValueError) as e:
            _LOG.warning("could not remove half a copy of step %d, the next will: %s", step, e)


def _refuse_if(failed: list[str]) -> None:
    if failed:
        raise CheckpointError(failed[0])
