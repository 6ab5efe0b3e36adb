# SPDX-License-Identifier: Apache-2.0
"""How learning rate and weight decay change."""

from __future__ import annotations

from typing import Literal

from attrs import define

from mb_config._fields import derived, number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class SchedulerConfig:
    """Schedules of learning rate and weight decay, all counted in samples in the end.

    A length given in iterations becomes the samples those iterations consume, ramp-up of the batch
    size included.

    Attributes:
        lr_decay_style: Shape of the decay.
        lr_wsd_decay_style: Shape of the last phase of WSD.
        lr_decay_iters: Steps until the learning rate is smallest; null means the whole run.
        lr_decay_samples: The same in samples.
        lr_wsd_decay_iters: Steps of the last phase of WSD.
        lr_wsd_decay_samples: The same in samples.
        lr_warmup_fraction: Part of the decay length that warms up.
        lr_warmup_iters: Steps of warm-up.
        lr_warmup_samples: The same in samples.
        lr_warmup_init: Learning rate at the start of warm-up.
        start_weight_decay: First weight decay; null means optimizer.weight_decay.
        end_weight_decay: Last weight decay; null means optimizer.weight_decay.
        weight_decay_incr_style: Shape of the way from start to end.
        override_opt_param_scheduler: On resume, use this schedule, not the checkpoint's.
        use_checkpoint_opt_param_scheduler: On resume, use the checkpoint's schedule, not this.
        lr_decay_steps: Derived: samples until the learning rate is smallest.
        lr_warmup_steps: Derived: samples of warm-up.
        wd_incr_steps: Derived: samples until the weight decay is at its end.
        wsd_decay_steps: Derived: samples of the last phase of WSD.
    """

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    lr_decay_iters: int | None = number(None, ge=1)
    lr_decay_samples: int | None = number(None, ge=1)
    lr_wsd_decay_iters: int | None = number(None, ge=1)
    lr_wsd_decay_samples: int | None = number(None, ge=1)
    lr_warmup_fraction: float | None = number(None, ge=0, lt=1)
    lr_warmup_iters: int = number(0, ge=0)
    lr_warmup_samples: int = number(0, ge=0)
    lr_warmup_init: float = number(0.0, ge=0)
    start_weight_decay: float | None = number(None, ge=0)
    end_weight_decay: float | None = number(None, ge=0)
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    override_opt_param_scheduler: bool = False
    use_checkpoint_opt_param_scheduler: bool = False
    lr_decay_steps: int | None = derived()
    lr_warmup_steps: int | None = derived()
    wd_incr_steps: int | None = derived()
    wsd_decay_steps: int | None = derived()

    __attrs_post_init__ = check_all
    __repr__ = concise
