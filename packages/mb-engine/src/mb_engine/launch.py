# SPDX-License-Identifier: Apache-2.0
"""Starting ranks on one machine with torch's own elastic launcher, and carrying errors back.

On several machines, or under Slurm and Kubernetes, start ``torchrun ... -m mb_engine.cli run ...``
instead: every rank then finds torchrun's variables and nothing is launched here.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mb_config.errors import ConfigError, Violation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_config import ConfigContainer

_ERROR_DIR = "MB_ENGINE_ERROR_DIR"
USER_ERROR = 2


def is_worker() -> bool:
    """Return whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_nproc(config: ConfigContainer, asked: int | None) -> int:
    """Return how many ranks to start on this machine.

    Args:
        config: Not resolved.
        asked: What the user said; otherwise the number of GPUs, or on a CPU as many as the model's
            parallel degrees need.

    Raises:
        ConfigError: If *asked* is not positive.
    """
    if asked is not None:
        if asked < 1:
            rule = Violation(
                field="--nproc", value=str(asked), rule="at least 1 rank", remedy="leave it out"
            )
            raise ConfigError.from_violations([rule])
        return asked
    if config.dist.device != "cpu":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    model = config.model
    return int(
        model.tensor_model_parallel_size
        * model.pipeline_model_parallel_size
        * model.context_parallel_size
    )


def check_before_launch(config: ConfigContainer, nproc: int) -> None:
    """Find what is wrong before any rank starts.

    Raises:
        UserError: As ``finalize`` and the data would on every rank.
    """
    from mb_engine.train.resolve import with_vocabulary

    with_vocabulary(config).finalize(nproc)


def launch(nproc: int, argv: Sequence[str], *, debug: bool) -> int:
    """Run ``mb-train`` *argv* on *nproc* ranks of this machine; return the exit code.

    The first rank's error message is printed as one line.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not debug:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # One rank a core at most: ranks that share cores through OpenMP slow each other down.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // nproc)))
    with tempfile.TemporaryDirectory(prefix="mb-train-") as folder:
        os.environ[_ERROR_DIR] = folder
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="mb-train",
            max_restarts=0,
            monitor_interval=0.1,
        )
        try:
            elastic_launch(config, entrypoint=sys.executable)("-m", "mb_engine.cli", *argv)
        except ChildFailedError as error:
            return _explain(error, Path(folder), debug=debug)
        finally:
            os.environ.pop(_ERROR_DIR, None)
    return 0


def _explain(error: Exception, folder: Path, *, debug: bool) -> int:
    messages = sorted(folder.glob("rank_*.txt"), key=lambda p: p.stat().st_mtime_ns)
    if debug and not messages:
        raise error
    if messages:
        print(f"error: {messages[0].read_text()}", file=sys.stderr)  # noqa: T201
        return USER_ERROR
    summary = "; ".join(
        f"rank {f.rank} ended with exit code {f.exitcode}"
        for f in getattr(error, "failures", {}).values()
    )
    print(f"error: {summary or error}", file=sys.stderr)  # noqa: T201
    return 1


def report_failure(message: str) -> bool:
    """Hand *message* to the process that launched this rank; return whether there is one."""
    folder = os.environ.get(_ERROR_DIR)
    if not folder or not is_worker():
        return False
    target = Path(folder) / f"rank_{int(os.environ['RANK']):05d}.txt"
    part = target.with_suffix(".part")
    part.write_text(message)
    part.rename(target)
    return True
