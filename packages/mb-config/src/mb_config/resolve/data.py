# SPDX-License-Identifier: Apache-2.0
"""Data set and evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mb_config.sections import (
    IndexedDatasetConfig,
    MockDatasetConfig,
    SFTDatasetConfig,
    TextDatasetConfig,
)

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
    if isinstance(dataset, TextDatasetConfig | SFTDatasetConfig | IndexedDatasetConfig):
        _split(draft, dataset, evaluated=evaluated)
    if isinstance(dataset, SFTDatasetConfig | IndexedDatasetConfig):
        _weights(draft, dataset)
    if isinstance(dataset, SFTDatasetConfig):
        _sft(draft, dataset)
    if isinstance(dataset, IndexedDatasetConfig):
        _indexed(draft, dataset)
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


def _split(
    draft: Draft,
    dataset: TextDatasetConfig | SFTDatasetConfig | IndexedDatasetConfig,
    *,
    evaluated: bool,
) -> None:
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


def _weights(draft: Draft, dataset: SFTDatasetConfig | IndexedDatasetConfig) -> None:
    weights = dataset.weights
    draft.require(
        weights is None or (len(weights) == len(dataset.path) and all(w > 0 for w in weights)),
        "dataset.weights",
        f"must be a positive number for each of the {len(dataset.path)} entries of dataset.path",
        "give as many, or leave it out",
    )


def _sft(draft: Draft, dataset: SFTDatasetConfig) -> None:
    model = draft.config.model
    cp = model.context_parallel_size
    needed = 2 * cp if cp > 1 and dataset.packing != "none" else 1
    draft.fill("dataset.pad_to_multiple", needed, f"context_parallel_size {cp}")
    multiple = dataset.pad_to_multiple or 1
    draft.require(
        multiple % needed == 0,
        "dataset.pad_to_multiple",
        f"must be a multiple of 2 x context_parallel_size = {needed}",
        "leave it out",
    )
    if dataset.packing == "offline":
        _one_row(draft, "dataset.packing")
        draft.require(
            (dataset.seq_length or multiple) % multiple == 0,
            "dataset.seq_length",
            f"must be a multiple of dataset.pad_to_multiple={multiple} with packing=offline",
            "change one of them",
        )


def _indexed(draft: Draft, dataset: IndexedDatasetConfig) -> None:
    train, validation = draft.config.train, draft.config.validation
    draft.require(
        train.num_epochs is None,
        "train.num_epochs",
        "cannot be counted with dataset.type=indexed, which shuffles for the length of the run",
        "give train.train_iters, train_samples or train_tokens",
    )
    draft.require(
        not (validation.full_validation and dataset.weights),
        "validation.full_validation",
        "has no end with dataset.weights, which may read a file several times",
        "set it to false, or name whole sets in dataset.validation_paths",
    )
    if not dataset.reset_attention_mask:
        return
    _one_row(draft, "dataset.reset_attention_mask")
    draft.require(
        draft.config.model.context_parallel_size == 1,
        "dataset.reset_attention_mask",
        "needs context_parallel_size=1, as documents have any length",
        "set it to false",
    )


def _one_row(draft: Draft, path: str) -> None:
    """Require that a micro-batch is one row, which is all that packed attention takes."""
    config = draft.config
    sizes = {
        "train.micro_batch_size": config.train.micro_batch_size,
        "validation.eval_micro_batch_size": config.validation.eval_micro_batch_size or 1,
    }
    for name, size in sizes.items():
        draft.require(
            size == 1, name, f"must be 1 with {path}, whose rows are packed", "set it to 1"
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
