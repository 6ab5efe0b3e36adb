# SPDX-License-Identifier: Apache-2.0
"""What a configuration will need before it is launched: memory, communication, time.

Nothing here imports torch or megatron-core.
"""

from __future__ import annotations

from mb_engine.plan.communication import Traffic
from mb_engine.plan.cost import StepTime
from mb_engine.plan.hardware import GPUS, Gpu, gpu_named
from mb_engine.plan.layout import Degrees
from mb_engine.plan.memory import StateMemory
from mb_engine.plan.ranks import Plan, RankPlan, plan
from mb_engine.plan.search import Candidate, search

__all__ = [
    "GPUS",
    "Candidate",
    "Degrees",
    "Gpu",
    "Plan",
    "RankPlan",
    "StateMemory",
    "StepTime",
    "Traffic",
    "gpu_named",
    "plan",
    "search",
]
