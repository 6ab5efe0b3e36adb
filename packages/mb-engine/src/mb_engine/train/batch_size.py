# SPDX-License-Identifier: Apache-2.0
"""Global batch size and number of micro-batches as pure functions of the samples consumed.

Ramp-up ``[start, increment, samples]`` raises the batch from ``start`` to the target,
``train.global_batch_size``, in ``n = (target - start) / increment`` equal stages: after ``c``
samples the batch is ``start + increment * min(n, floor(c * n / samples))``. The formula is
megatron-core's (``num_microbatches_calculator``), in exact integers; megatron-core divides in
float64 and is one increment late where ``c * n / samples`` is an integer that float64 rounds down.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from attrs import field, frozen
from attrs.validators import ge
from mb_config.errors import ConfigError, Violation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import ConfigContainer


class Stage(NamedTuple):
    """A run of steps of one batch size.

    Attributes:
        first_step: Steps done before it.
        first_sample: Samples consumed before it.
        batch_size: Samples a step.
        steps: Steps it lasts; None for the last stage, which has no end.
    """

    first_step: int
    first_sample: int
    batch_size: int
    steps: int | None


def _tuple(value: list[int] | tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


@frozen(kw_only=True)
class BatchSizeSchedule:
    """How many samples each optimizer step takes.

    Every size the schedule can reach is checked at construction.

    Attributes:
        target_batch_size: Samples a step after the ramp-up, over all ranks.
        micro_batch_size: Samples of one forward pass on one rank.
        data_parallel_size: Ranks that read different samples.
        rampup_batch_size: ``(start, increment, samples)``, or None for a constant size.
        decrease_batch_size_if_needed: Round a size that ``micro_batch_size * data_parallel_size``
            does not divide down instead of refusing it.

    Raises:
        ConfigError: A size is not divisible, or the ramp-up does not reach the global batch size.
    """

    target_batch_size: int = field(validator=ge(1))
    micro_batch_size: int = field(default=1, validator=ge(1))
    data_parallel_size: int = field(default=1, validator=ge(1))
    rampup_batch_size: tuple[int, ...] | None = field(default=None, converter=_tuple)
    decrease_batch_size_if_needed: bool = False

    def __attrs_post_init__(self) -> None:
        if self.rampup_batch_size is not None:
            self._check_rampup(self.rampup_batch_size)
        sizes = [self.nominal_batch_size(c) for c in self._stage_starts()]
        for size in sizes:
            if self._running(size) == 0 or (
                size % self.samples_per_microstep and not self.decrease_batch_size_if_needed
            ):
                raise self._indivisible(size)

    @classmethod
    def from_config(cls, config: ConfigContainer) -> BatchSizeSchedule:
        """Return the schedule of a resolved *config* (``finalize`` has been called)."""
        train = config.train
        assert train.global_batch_size is not None, "the configuration is not resolved"
        assert train.data_parallel_size is not None, "the configuration is not resolved"
        return cls(
            target_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            data_parallel_size=train.data_parallel_size,
            rampup_batch_size=train.rampup_batch_size,
            decrease_batch_size_if_needed=train.decrease_batch_size_if_needed,
        )

    @property
    def samples_per_microstep(self) -> int:
        """Samples of one micro-batch over all data-parallel ranks."""
        return self.micro_batch_size * self.data_parallel_size

    def nominal_batch_size(self, consumed_samples: int) -> int:
        """Return the batch size asked for after *consumed_samples*, before any rounding."""
        if self.rampup_batch_size is None:
            return self.target_batch_size
        start, increment, samples = self.rampup_batch_size
        if consumed_samples >= samples:
            return self.target_batch_size
        increments = (self.target_batch_size - start) // increment
        return start + increment * (consumed_samples * increments // samples)

    def global_batch_size(self, consumed_samples: int) -> int:
        """Return the samples that the step after *consumed_samples* really takes."""
        return self._running(self.nominal_batch_size(consumed_samples))

    def num_microbatches(self, consumed_samples: int) -> int:
        """Return the micro-batches a rank runs in the step after *consumed_samples*."""
        return self.global_batch_size(consumed_samples) // self.samples_per_microstep

    def stages(self) -> Iterator[Stage]:
        """Yield the stages of constant batch size in order; the last one has no end."""
        step = consumed = 0
        starts = [*self._stage_starts()[1:], None]
        size = self.global_batch_size(0)
        first_step, first_sample = step, consumed
        for threshold in starts:
            if threshold is None:
                yield Stage(first_step, first_sample, size, None)
                return
            # a step may pass the threshold, or several at once: the size changes between steps
            steps = max(0, -(-(threshold - consumed) // size))
            step, consumed = step + steps, consumed + steps * size
            following = self.global_batch_size(consumed)
            if following != size:
                yield Stage(first_step, first_sample, size, step - first_step)
                first_step, first_sample, size = step, consumed, following

    def samples_at_iteration(self, iteration: int) -> int:
        """Return the samples consumed by the first *iteration* steps."""
        stage = next(
            s for s in self.stages() if s.steps is None or iteration < s.first_step + s.steps
        )
        return stage.first_sample + (iteration - stage.first_step) * stage.batch_size

    def iterations_for_samples(self, samples: int) -> int:
        """Return how many whole steps fit into *samples*; a partial last batch is left out."""
        for stage in self.stages():
            last = stage.first_step + (samples - stage.first_sample) // stage.batch_size
            if stage.steps is None or last < stage.first_step + stage.steps:
                return max(0, last)
        raise AssertionError  # the last stage has no end

    def iterations_for_epochs(self, num_epochs: float, dataset_samples: int) -> int:
        """Return the steps of *num_epochs* over *dataset_samples*, a partial batch counted whole.

        ``ceil(num_epochs * steps of one epoch)`` where the batch size is constant; with ramp-up the
        smallest number of steps that consumes ``num_epochs * dataset_samples``.
        """
        if self.rampup_batch_size is None:
            return math.ceil(num_epochs * math.ceil(dataset_samples / self.global_batch_size(0)))
        wanted = math.ceil(num_epochs * dataset_samples)
        iterations = self.iterations_for_samples(wanted)
        return iterations + (self.samples_at_iteration(iterations) < wanted)

    def _running(self, size: int) -> int:
        if self.decrease_batch_size_if_needed:
            return size - size % self.samples_per_microstep
        return size

    def _stage_starts(self) -> list[int]:
        """Return the consumed samples at which each nominal size begins."""
        if self.rampup_batch_size is None or self.rampup_batch_size[2] == 0:
            return [0]
        start, increment, samples = self.rampup_batch_size
        increments = (self.target_batch_size - start) // increment
        return [-(-k * samples // increments) for k in range(increments + 1)] if increments else [0]

    def _check_rampup(self, rampup: tuple[int, ...]) -> None:
        if (
            len(rampup) != 3
            or rampup[0] < 1
            or rampup[1] < 1
            or rampup[2] < 0
            or rampup[0] > self.target_batch_size
            or (self.target_batch_size - rampup[0]) % rampup[1]
        ):
            raise ConfigError.from_violations(
                [
                    Violation(
                        field="train.rampup_batch_size",
                        value=str(list(rampup)),
                        rule="must be [start, increment, samples] with whole increments from start "
                        f"to global_batch_size={self.target_batch_size}",
                        remedy="choose an increment that divides global_batch_size - start",
                    )
                ]
            )

    def _indivisible(self, size: int) -> ConfigError:
        ramp = "" if size == self.target_batch_size else f" (reached in the ramp-up: {size})"
        return ConfigError.from_violations(
            [
                Violation(
                    field="train.global_batch_size",
                    value=f"{self.target_batch_size}{ramp}",
                    rule="must be a positive multiple of micro_batch_size * data_parallel_size = "
                    f"{self.micro_batch_size} * {self.data_parallel_size}",
                    remedy="change one of them, or set train.decrease_batch_size_if_needed=true",
                )
            ]
        )
