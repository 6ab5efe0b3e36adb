# SPDX-License-Identifier: Apache-2.0
"""Profiling."""

from __future__ import annotations

from attrs import define, field

from mb_config._fields import number, within
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class ProfilingConfig:
    """PyTorch profiler over some steps; traces go below logger.log_dir.

    Attributes:
        use_pytorch_profiler: Switch it on.
        profile_step_start: First step profiled.
        profile_step_end: Step before which it ends.
        profile_ranks: Ranks that profile.
        record_shapes: Record shapes of operator inputs.
        with_stack: Record Python stacks.
    """

    use_pytorch_profiler: bool = False
    profile_step_start: int = number(10, ge=0)
    profile_step_end: int = number(12, ge=1)
    profile_ranks: list[int] = field(factory=lambda: [0], metadata=within(ge=0))
    record_shapes: bool = False
    with_stack: bool = False

    __attrs_post_init__ = check_all
    __repr__ = concise
