# SPDX-License-Identifier: Apache-2.0
"""Samples and steps under a batch-size ramp-up, in exact integers.

With ramp-up ``[start, increment, samples]`` and ``n = (target - start) / increment``, the batch
after ``c`` consumed samples is ``start + increment * floor(c * n / samples)``, and the target once
``c >= samples``; as megatron-core's ``num_microbatches_calculator`` has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator


@frozen(kw_only=True)
class Ramp:
    """Batch sizes of a run.

    Attributes:
        target: Samples of a step in the end.
        start: Samples of the first step.
        increment: Samples added at each stage.
        samples: Samples after which the target is reached; 0 means no ramp-up.
        multiple: Each batch is rounded down to a multiple of this.
    """

    target: int
    start: int = 0
    increment: int = 1
    samples: int = 0
    multiple: int = 1

    def sizes(self) -> list[int]:
        """Return every batch size of the run in order, before rounding."""
        if not self.samples:
            return [self.target]
        return list(range(self.start, self.target + 1, self.increment))

    def batch_at(self, consumed: int) -> int:
        """Return the samples of the step that begins after *consumed* samples."""
        size = self.target
        if consumed < self.samples:
            count = (self.target - self.start) // self.increment
            size = self.start + self.increment * (consumed * count // self.samples)
        return size - size % self.multiple

    def samples_after(self, steps: int) -> int:
        """Return the samples that the first *steps* steps consume."""
        done = consumed = 0
        for end, size in self._stages():
            count = steps - done if end is None else max(0, -(-(end - consumed) // size))
            if done + count >= steps:
                return consumed + (steps - done) * size
            done, consumed = done + count, consumed + count * size
        raise AssertionError  # the last stage has no end

    def steps_within(self, samples: int) -> int:
        """Return how many whole steps *samples* samples are enough for."""
        done = consumed = 0
        for end, size in self._stages():
            count = max(0, (samples - consumed) // size)
            if end is None:
                return done + count
            whole = max(0, -(-(end - consumed) // size))
            if count < whole:
                return done + count
            done, consumed = done + whole, consumed + whole * size
        raise AssertionError  # the last stage has no end

    def _stages(self) -> Iterator[tuple[int | None, int]]:
        """Yield ``(consumed samples at which the stage ends, batch size)``; the last has no end."""
        if self.samples:
            count = (self.target - self.start) // self.increment
            for k in range(count):
                size = self.start + k * self.increment
                yield -(-(k + 1) * self.samples // count), size - size % self.multiple
        yield None, self.target - self.target % self.multiple
