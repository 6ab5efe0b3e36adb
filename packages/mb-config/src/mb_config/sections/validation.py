# SPDX-License-Identifier: Apache-2.0
"""When and how to evaluate."""

from __future__ import annotations

from attrs import define

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class ValidationConfig:
    """Evaluation on held-out data during and after training.

    Attributes:
        eval_interval: Steps between evaluations; null evaluates only as eval_at_end says.
        eval_iters: Batches of one evaluation; 0 switches it off, but for full_validation.
        start_eval_at_iter: First step at which to evaluate; null means from the start.
        eval_global_batch_size: Samples of one evaluation batch; null means as in training.
        eval_micro_batch_size: Samples at a time; null means as in training.
        skip_train: Only evaluate.
        full_validation: Run over the whole set instead of eval_iters batches.
        eval_at_end: Evaluate after the last step, where there is validation data.
    """

    eval_interval: int | None = number(None, ge=1)
    eval_iters: int = number(100, ge=0)
    start_eval_at_iter: int | None = number(None, ge=0)
    eval_global_batch_size: int | None = number(None, ge=1)
    eval_micro_batch_size: int | None = number(None, ge=1)
    skip_train: bool = False
    full_validation: bool = False
    eval_at_end: bool = True

    __attrs_post_init__ = check_all
    __repr__ = concise
