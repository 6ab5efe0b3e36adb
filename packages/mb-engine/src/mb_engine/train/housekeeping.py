# SPDX-License-Identifier: Apache-2.0
"""What a long run needs around its steps: garbage collection, caches, checks, the profiler."""

from __future__ import annotations

import gc
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from attrs import define, field

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import ConfigContainer

    from mb_engine.train.engine import Engine

logger = logging.getLogger(__name__)


@define(kw_only=True, eq=False)
class Housekeeping:
    """A context manager around a run, told of every step.

    Attributes:
        config: The resolved configuration.
        engine: What is trained.
    """

    config: ConfigContainer
    engine: Engine
    _profiler: Any = field(default=None, init=False)

    def __enter__(self) -> Self:
        """Take over garbage collection where asked: ranks that collect together wait together."""
        if self.config.train.manual_gc:
            gc.disable()
            gc.collect()
        return self

    def __exit__(self, *exc: object) -> None:
        """Give garbage collection back and end a running profile."""
        if self.config.train.manual_gc:
            gc.enable()
        self._stop_profiler()

    def before_step(self, step: int) -> None:
        """Start the profiler where its window begins; *step* steps are done."""
        profiling = self.config.profiling
        if (
            profiling.use_pytorch_profiler
            and self.engine.layout.rank in profiling.profile_ranks
            and profiling.profile_step_start <= step < profiling.profile_step_end
            and self._profiler is None
        ):
            self._profiler = _start_profiler(self.config)

    def after_step(self, step: int) -> None:
        """Do what is due after *step* steps."""
        train = self.config.train
        if self._profiler is not None:
            self._profiler.step()
            if step >= self.config.profiling.profile_step_end:
                self._stop_profiler()
        if train.manual_gc and train.manual_gc_interval and step % train.manual_gc_interval == 0:
            gc.collect()
        if self.engine.layout.device.startswith("cuda"):
            if train.empty_unused_memory_level >= 1:
                torch.cuda.empty_cache()
            if train.train_sync_interval and step % train.train_sync_interval == 0:
                torch.cuda.synchronize()
        interval = train.check_weight_hash_across_dp_replicas_interval
        if interval and step % interval == 0:
            self._check_replicas(step)

    @contextmanager
    def around_evaluation(self) -> Iterator[None]:
        """Collect garbage on all ranks together before and after an evaluation, where asked."""
        collect = self.config.train.manual_gc and self.config.train.manual_gc_eval
        if collect:
            gc.collect()
        yield
        if collect:
            # What an evaluation leaves is young.
            gc.collect(generation=0)

    def _check_replicas(self, step: int) -> None:
        from megatron.core.utils import check_param_hashes_across_dp_replicas

        with self.engine.synced_parameters():
            same = check_param_hashes_across_dp_replicas(self.engine.model)
        if not same:
            raise EngineError(
                f"parameters differ between data-parallel replicas at step {step}; a device may be"
                " faulty: resume from the last checkpoint on other hardware"
            )

    def _stop_profiler(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = _trace_folder(self.config)
        path = folder / f"rank-{self.engine.layout.rank}.json.gz"
        profiler.export_chrome_trace(str(path))
        logger.info("wrote the profile %s", path)


def _trace_folder(config: ConfigContainer) -> Path:
    folder = Path(config.logger.log_dir or ".") / "torch_profile"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _start_profiler(config: ConfigContainer) -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(
        activities=activities,
        record_shapes=config.profiling.record_shapes,
        with_stack=config.profiling.with_stack,
    )
    profiler.start()
    return profiler
