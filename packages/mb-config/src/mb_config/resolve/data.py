# SPDX-License-Identifier: Apache-2.0
"""Data set and evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mb_config.sections import MockDatasetConfig, TextDatasetConfig

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft


def resolve(draft: Draft) -> None:
    """Derive the length of samples and check what is trained on."""
    model, dataset = draft.config.model, draft.config.dataset
    if hasattr(dataset, "seq_length") and model.seq_length > 0:
        draft.fill("dataset.seq_length", model.seq_length, "model.seq_length")
        draft.require(
            dataset.seq_length == model.seq_length,
            "dataset.seq_length",
            f"must equal model.seq_length={model.seq_length}",
            "leave it out",
        )
    evaluated = _is_evaluated(draft)
    if isinstance(dataset, TextDatasetConfig):
        _text(draft, dataset, evaluated=evaluated)
    if isinstance(dataset, MockDatasetConfig) and evaluated:
        draft.require(
            dataset.num_validation_samples > 0,
            "dataset.num_validation_samples",
            "must be above 0 where validation is on",
            "raise it, or set validation.eval_interval=null",
        )
    _evaluation(draft)


def _is_evaluated(draft: Draft) -> bool:
    validation = draft.config.validation
    runs = validation.eval_iters > 0 or validation.full_validation
    return runs and (validation.eval_interval is not None or validation.skip_train)


def _text(draft: Draft, dataset: TextDatasetConfig, *, evaluated: bool) -> None:
    shares = _shares(dataset.split)
    if not draft.require(
        shares is not None,
        "dataset.split",
        "must be percentages of train, validation and test that add up to 100",
        "write it as '90,10,0'",
    ):
        return
    assert shares is not None
    draft.require(
        shares[0] > 0 or draft.config.validation.skip_train,
        "dataset.split",
        "leaves nothing to train on",
        "write it as '90,10,0'",
    )
    draft.require(
        not evaluated or shares[1] > 0 or dataset.validation_paths,
        "dataset.split",
        "leaves nothing to validate on, but validation is on",
        "write it as '90,10,0', or give dataset.validation_paths",
    )


def _shares(split: str) -> list[float] | None:
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        return None
    valid = len(shares) == 3 and all(math.isfinite(s) and s >= 0 for s in shares)
    return shares if valid and math.isclose(sum(shares), 100, abs_tol=1e-6) else None


def _evaluation(draft: Draft) -> None:
    validation, train = draft.config.validation, draft.config.train
    draft.require(
        validation.start_eval_at_iter is None or validation.eval_interval is not None,
        "validation.start_eval_at_iter",
        "has no effect without eval_interval",
        "give validation.eval_interval",
    )
    draft.require(
        not validation.skip_train or validation.eval_iters > 0 or validation.full_validation,
        "validation.eval_iters",
        "must be above 0 with skip_train, which would do nothing",
        "raise it",
    )
    if train.train_iters is not None:
        steps = [s for s in train.iterations_to_skip if s > train.train_iters]
        draft.require(
            not steps,
            "train.iterations_to_skip",
            f"step {steps[0] if steps else 0} comes after the last one, {train.train_iters}",
            "leave it out",
        )
