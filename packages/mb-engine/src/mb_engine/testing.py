# SPDX-License-Identifier: Apache-2.0
"""For tests: a tiny configuration, and functions run on several gloo ranks of this machine."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from mb_config import ConfigContainer

_POLL_S = 0.02


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def tiny_config(*overrides: str) -> ConfigContainer:
    """Return an unresolved configuration of a model small enough for any test.

    Four layers, hidden size 64, 4 query heads over 2 groups, gated MLP of 128, vocabulary 128,
    sequences of 32, mock data, float32.

    Args:
        overrides: Dotted assignments such as ``"model.num_layers=2"``.
    """
    from mb_config import ConfigContainer

    config = ConfigContainer.from_dict(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 128,
                "seq_length": 32,
                "vocab_size": 128,
            },
            "train": {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": 2},
            "dataset": {"type": "mock"},
            "dist": {"device": "cpu", "distributed_timeout_minutes": 1.0},
        }
    )
    return config.override(*overrides)


def run_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Run *function* on fresh processes that find each other as torchrun's would.

    Args:
        function: Importable by name; it is called with *args* on every rank.
        ranks: How many processes.
        args: Picklable.
        timeout_s: Seconds until all processes are killed.

    Returns:
        What *function* returned (picklable), by rank.

    Raises:
        RankError: If a rank raised, died or did not end in time; all others are killed first.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="mb-ranks-") as folder:
        port = free_port()
        processes = [
            context.Process(
                target=_run_rank,
                args=(function, args, rank, ranks, port, folder),
                name=f"rank {rank}",
            )
            for rank in range(ranks)
        ]
        try:
            _start(processes)
            _wait(processes, Path(folder), time.monotonic() + timeout_s)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [pickle.loads(_file(folder, r, "result").read_bytes()) for r in range(ranks)]  # noqa: S301


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _file(folder: str | Path, rank: int, kind: str) -> Path:
    return Path(folder) / f"{kind}_{rank}"


def _start(processes: list[Any]) -> None:
    # Children read this when they import torch, before any code of theirs runs.
    saved = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        for process in processes:
            process.start()
    finally:
        if saved is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = saved


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    running = list(range(len(processes)))
    while running:
        failed = [r for r in running if processes[r].exitcode not in (None, 0)]
        if failed:
            # The first to raise is the cause; others may only have lost their peer.
            raised = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
            if raised:
                raise RankError(raised[0].read_text())
            raise RankError(
                f"rank {failed[0]} ended with exit code {processes[failed[0]].exitcode}"
            )
        running = [r for r in running if processes[r].exitcode is None]
        if running and time.monotonic() > deadline:
            raise RankError(f"ranks {running} did not end in time")
        time.sleep(_POLL_S)


def _run_rank(  # noqa: PLR0917
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    ranks: int,
    port: int,
    folder: str,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        result = pickle.dumps(function(*args))
    except BaseException:  # noqa: BLE001 - the parent raises it
        _write(_file(folder, rank, "error"), f"rank {rank}:\n{traceback.format_exc()}".encode())
        raise SystemExit(1) from None
    _write(_file(folder, rank, "result"), result)


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"part_{path.name}")
    part.write_bytes(content)
    part.rename(path)
