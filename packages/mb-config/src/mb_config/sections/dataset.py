# SPDX-License-Identifier: Apache-2.0
"""What to train on: variants told apart by ``type:``; strangers add theirs by entry point."""

from __future__ import annotations

from typing import Literal, Protocol

from attrs import define, field

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


class DatasetConfig(Protocol):
    """What every dataset section has; a variant of one's own is an attrs class with these.

    Register it under the entry-point group ``mb.dataset_configs``; the name there is its ``type:``.

    Attributes:
        seq_length: Tokens of a sample; null means model.seq_length.
        dataloader_type: single reads in order, cyclic goes on for ever in shuffled epochs.
        num_workers: Loader processes of a rank; 0 loads in the training process.
        pin_memory: Copy batches to pinned memory, on CUDA.
        shuffle: Shuffle samples anew each epoch.
        drop_last: Leave out the last samples of an epoch that do not fill a batch.
    """

    seq_length: int | None
    dataloader_type: Literal["single", "cyclic"]
    num_workers: int
    pin_memory: bool
    shuffle: bool
    drop_last: bool


@define(kw_only=True, on_setattr=checked)
class TextDatasetConfig:
    """Plain text files, tokenized and cut into samples of equal length (``type: text``).

    Attributes:
        path: Files or glob patterns, read in this order; ``pydoc:topics`` is the text of the Python
            documentation that comes with every Python. Required.
        split: Percentages of train, validation and test, cut by position.
        validation_paths: Further validation sets, name to file.
        random_offset: Shift the cuts each epoch, so that samples differ.
        seq_length: Tokens of a sample; null means model.seq_length.
        dataloader_type: single reads in order, cyclic goes on for ever in shuffled epochs.
        num_workers: Loader processes of a rank; 0 loads in the training process.
        pin_memory: Copy batches to pinned memory, on CUDA.
        shuffle: Shuffle samples anew each epoch.
        drop_last: Leave out the last samples of an epoch that do not fill a batch.
    """

    path: list[str] = field(factory=list)
    split: str = "90,10,0"
    validation_paths: dict[str, str] = field(factory=dict)
    random_offset: bool = False
    seq_length: int | None = number(None, ge=1)
    dataloader_type: Literal["single", "cyclic"] = "cyclic"
    num_workers: int = number(0, ge=0)
    pin_memory: bool = True
    shuffle: bool = True
    drop_last: bool = True

    __attrs_post_init__ = check_all
    __repr__ = concise


@define(kw_only=True, on_setattr=checked)
class MockDatasetConfig:
    """Made-up tokens, for tests and measurements (``type: mock``).

    Attributes:
        num_samples: Samples of the training set.
        num_validation_samples: Samples of the validation set.
        pattern: random tokens cannot be learned; counting ones (each token is the one before plus
            a step of the sample's own) can.
        seq_length: Tokens of a sample; null means model.seq_length.
        dataloader_type: single reads in order, cyclic goes on for ever in shuffled epochs.
        num_workers: Loader processes of a rank; 0 loads in the training process.
        pin_memory: Copy batches to pinned memory, on CUDA.
        shuffle: Shuffle samples anew each epoch.
        drop_last: Leave out the last samples of an epoch that do not fill a batch.
    """

    num_samples: int = number(10_000, ge=1)
    num_validation_samples: int = number(1_000, ge=0)
    pattern: Literal["random", "counting"] = "counting"
    seq_length: int | None = number(None, ge=1)
    dataloader_type: Literal["single", "cyclic"] = "cyclic"
    num_workers: int = number(0, ge=0)
    pin_memory: bool = True
    shuffle: bool = True
    drop_last: bool = True

    __attrs_post_init__ = check_all
    __repr__ = concise
