# SPDX-License-Identifier: Apache-2.0
"""What a configuration will need before it is launched: memory, communication, time.

Nothing here imports torch or megatron-core.
"""

from __future__ import annotations

from mb_engine.plan.communication import Traffic
from mb_engine.plan.hardware import GPUS, Gpu, gpu_named
from mb_engine.plan.layout import Degrees
from mb_engine.plan.memory import StateMemory
from mb_engine.plan.ranks import Plan, RankPlan, plan

__all__ = [
    "GPUS",
    "Degrees",
    "Gpu",
    "Plan",
    "RankPlan",
    "StateMemory",
    "Traffic",
    "gpu_named",
    "plan",
]
