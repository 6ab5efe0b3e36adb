# SPDX-License-Identifier: Apache-2.0
"""A training loop to save from, timed by the micro-batch, and the memory of a process and its own."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from attrs import define, field

MICRO_BATCHES = 24
"""Of one optimizer step: some 0.15 s on one core, as long as a copy of the big state and more."""
QUIET_STEPS = 2
TAIL_STEPS = 2
LONGEST_S = 60.0


@define(eq=False)
class Training:
    """Some layers and AdamW; what matters is that Python, autograd and kernels all have work."""

    model: Any = field(factory=lambda: torch.nn.Sequential(*_layers()))
    optimizer: Any = field(init=False)
    batch: Any = field(factory=lambda: torch.randn(128, 256))

    def __attrs_post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def micro_batch(self) -> float:
        """Return the seconds of one forward and backward pass."""
        began = time.perf_counter()
        self.model(self.batch).square().mean().backward()
        return time.perf_counter() - began

    def update(self) -> None:
        """Take the optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def _layers() -> list[Any]:
    return [layer for _ in range(8) for layer in (torch.nn.Linear(256, 256), torch.nn.GELU())]


def watch_save(training: Training, save: Callable[[], Any] | None) -> dict[str, float]:
    """Save once from the running loop and say what that cost it.

    Args:
        training: The loop.
        save: Begins the save, returns a `contenders.checkpointers.Begun`; None watches the loop
            alone for a second, which is what the machine's other work does to every row.

    Returns:
        Seconds: ``blocking``, in the call and at the fence before the next optimizer step; ``lost``,
        by which loop and save together took longer than as many steps without; ``stall``, by which
        the longest micro-batch was longer than usual; ``durable``, from the call until the save was
        found to be over after a step.
    """
    before = [_quiet_step(training) for _ in range(QUIET_STEPS)]
    usual = statistics.median(t for times, _ in before for t in times)
    micro: list[float] = []
    began = time.perf_counter()
    begun = save() if save is not None else None
    blocking = time.perf_counter() - began
    durable = 0.0
    steps = tail = 0
    while tail < TAIL_STEPS and time.perf_counter() - began < LONGEST_S:
        micro += [training.micro_batch() for _ in range(MICRO_BATCHES)]
        if begun is not None:
            waiting = time.perf_counter()
            begun.fence()
            blocking += time.perf_counter() - waiting
        training.update()
        steps += 1
        over = time.perf_counter() - began > 1.0
        if begun is not None:
            begun.poll()
            over = begun.done()
            durable = durable or over * (time.perf_counter() - began)
        tail += over
    took = time.perf_counter() - began
    if begun is not None:
        begun.wait()
    after = [_quiet_step(training) for _ in range(QUIET_STEPS)]
    step = statistics.mean(total for _, total in (*before, *after))
    return {
        "blocking": blocking,
        "lost": took - steps * step,
        "stall": max(micro) - usual,
        "durable": durable,
    }


def _quiet_step(training: Training) -> tuple[list[float], float]:
    began = time.perf_counter()
    times = [training.micro_batch() for _ in range(MICRO_BATCHES)]
    training.update()
    return times, time.perf_counter() - began


class MemoryPeak:
    """The most memory that this process and those it has started held together, over a while.

    Pages shared between processes count once; the page cache does not count.
    """

    def __init__(self) -> None:
        self.baseline = _proportional_set_size()
        self.peak = self.baseline
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        """Bytes."""
        return self.peak - self.baseline

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, _proportional_set_size())


def _proportional_set_size() -> int:
    total, processes = 0, ["self"]
    while processes:
        place = Path("/proc") / processes.pop()
        try:
            processes += (
                (place / "task").joinpath(_main_thread(place), "children").read_text().split()
            )
            lines = (place / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def _main_thread(place: Path) -> str:
    return place.resolve().name
