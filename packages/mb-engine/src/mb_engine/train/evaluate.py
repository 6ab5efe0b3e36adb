# SPDX-License-Identifier: Apache-2.0
"""Adding up the loss of an evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mb_config.records import EvalEvent, LossTerms

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable


def accumulate(parts: Iterable[LossTerms]) -> LossTerms:
    """Return the sum of *parts*.

    Raises:
        EngineError: If there are none.
    """
    total: LossTerms | None = None
    for part in parts:
        total = part if total is None else _add(total, part)
    if total is None:
        raise EngineError("the evaluation has no batch: its data set is smaller than one batch")
    return total


def _add(a: LossTerms, b: LossTerms) -> LossTerms:
    metrics = {n: (a.metrics[n][0] + s, a.metrics[n][1] + c) for n, (s, c) in b.metrics.items()}
    return LossTerms(
        loss_sum=a.loss_sum + b.loss_sum, num_tokens=a.num_tokens + b.num_tokens, metrics=metrics
    )


def eval_event(terms: LossTerms, *, step: int, name: str, seconds: float) -> EvalEvent:
    """Return *terms* as a record; reads the device."""
    loss = float(terms.loss)
    return EvalEvent(
        step=step,
        name=name,
        loss=loss,
        perplexity=math.exp(min(20.0, loss)),
        num_tokens=int(terms.num_tokens),
        seconds=seconds,
        metrics={n: float(s / c) for n, (s, c) in terms.metrics.items()},
    )
