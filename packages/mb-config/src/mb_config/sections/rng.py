# SPDX-License-Identifier: Apache-2.0
"""Random numbers."""

from __future__ import annotations

from attrs import define

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class RNGConfig:
    """Seeds.

    Attributes:
        seed: Of weights, dropout and data order; each pipeline stage adds 100 x its rank.
        data_parallel_random_init: Different initial weights on data-parallel ranks, made equal by a
            broadcast.
        te_rng_tracker: Use Transformer Engine's random state tracker, which CUDA graphs need.
    """

    seed: int = number(1234, ge=1)
    data_parallel_random_init: bool = False
    te_rng_tracker: bool = False

    __attrs_post_init__ = check_all
    __repr__ = concise
