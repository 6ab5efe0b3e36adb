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
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge
from mb_config.errors import ConfigError, Violation
from mb_config.ramp import Ramp

if TYPE_CHECKING:
    from mb_config import ConfigContainer


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
    _ramp: Ramp = field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self.rampup_batch_size is not None:
            self._check_rampup(self.rampup_batch_size)
        start, increment, samples = self.rampup_batch_size or (self.target_batch_size, 1, 0)
        unit = self.samples_per_microstep
        ramp = Ramp(
            target=self.target_batch_size,
            start=start,
            increment=increment,
            samples=samples,
            multiple=unit if self.decrease_batch_size_if_needed else 1,
        )
        for size in ramp.sizes():
            if size < unit or (size % unit and not self.decrease_batch_size_if_needed):
                raise self._indivisible(size)
        object.__setattr__(self, "_ramp", ramp)

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

    def global_batch_size(self, consumed_samples: int) -> int:
        """Return the samples of the step that begins after *consumed_samples*, over all ranks."""
        return self._ramp.batch_at(consumed_samples)

    def num_microbatches(self, consumed_samples: int) -> int:
        """Return the micro-batches a rank runs in the step that begins after *consumed_samples*."""
        return self.global_batch_size(consumed_samples) // self.samples_per_microstep

    def samples_at_iteration(self, iteration: int) -> int:
        """Return the samples consumed by the first *iteration* steps."""
        return self._ramp.samples_after(iteration)

    def iterations_for_samples(self, samples: int) -> int:
        """Return how many whole steps fit into *samples*; a partial last batch is left out."""
        return self._ramp.steps_within(samples)

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
