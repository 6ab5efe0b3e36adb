# SPDX-License-Identifier: Apache-2.0
"""Token files of megatron-core."""

from __future__ import annotations

from typing import Literal

from attrs import define, field

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class IndexedDatasetConfig:
    """megatron-core's indexed files, one or a blend of several (``type: indexed``).

    ``mb-train data build`` makes such files. Documents are shuffled by megatron-core with the seed
    of the run, for as many epochs as the run needs; so the loader reads samples in order.

    Attributes:
        path: Prefixes of .bin and .idx files. Required.
        weights: Share of the samples that each entry of path gives; null means by size.
        split: Percentages of train, validation and test, cut by position of documents.
        validation_paths: Further validation sets, name to prefix.
        cache_dir: Folder where megatron-core keeps its shuffled indices; null means beside the data.
        mmap: Map the token file into memory rather than read from it.
        reset_position_ids: Count positions anew in each document.
        reset_attention_mask: Keep attention within documents, by boundaries of a packed row; needs
            train.micro_batch_size=1.
        eod_mask_loss: Leave the end-of-document token out of the loss.
        seq_length: Tokens of a sample; null means model.seq_length.
        dataloader_type: single reads the samples, shuffled already, in order; cyclic goes on with
            them from the beginning.
        num_workers: Loader processes of a rank; 0 loads in the training process.
        pin_memory: Copy batches to pinned memory, on CUDA.
        shuffle: With cyclic: shuffle them once more.
        drop_last: Leave out the last samples of an epoch that do not fill a batch.
    """

    path: list[str] = field(factory=list)
    weights: list[float] | None = None
    split: str = "90,10,0"
    validation_paths: dict[str, str] = field(factory=dict)
    cache_dir: str | None = None
    mmap: bool = True
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    seq_length: int | None = number(None, ge=1)
    dataloader_type: Literal["single", "cyclic"] = "single"
    num_workers: int = number(0, ge=0)
    pin_memory: bool = True
    shuffle: bool = False
    drop_last: bool = True

    __attrs_post_init__ = check_all
    __repr__ = concise
