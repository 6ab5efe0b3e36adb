# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on prompts with completions, or on chats."""

from __future__ import annotations

from typing import Literal

from attrs import define, field

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


@define(kw_only=True, on_setattr=checked)
class SFTDatasetConfig:
    """Prompts with completions, or chats, from JSONL or Parquet files (``type: sft``).

    Attributes:
        path: Files or glob patterns. Required.
        weights: Share of the samples of an epoch that each entry of path gives; an entry is read
            several times, or in part, to that end. null reads each entry once.
        split: Percentages of train, validation and test; a hash decides about each record.
        validation_paths: Further validation sets, name to file.
        messages_key: Field of a record with a list of messages, which makes it a chat.
        tools_key: Field of a chat with the functions that the assistant may call.
        prompt_key: Field with the prompt of a record that is no chat.
        completion_key: Field with its completion.
        loss_on: What is learnt. completion: the completion, or in a chat what the assistant writes
            after the last message of the user. assistant: all that it writes. last_turn: its last
            message. all: every token.
        append_eod: End a completion with the end-of-document token; a chat ends as its template has
            it.
        truncation: Of samples longer than seq_length. right cuts the end, left the beginning, skip
            leaves the sample out, error refuses it.
        bad_records: error ends at a record that cannot be used, skip counts it and goes on.
        packing: none pads each sample to seq_length. in_batch lays the samples of a step into as
            many rows as it has micro-batches, however long. offline fills rows of seq_length
            beforehand; a row counts as a sample.
        pad_to_multiple: Of a packed sample's length; null means what context parallelism needs.
        cache_dir: Folder for prepared data; null means .mb-cache beside the first file.
        seq_length: Most tokens of a sample; null means model.seq_length.
        dataloader_type: single reads in order, cyclic goes on for ever in shuffled epochs.
        num_workers: Loader processes of a rank; 0 loads in the training process.
        pin_memory: Copy batches to pinned memory, on CUDA.
        shuffle: Shuffle samples anew each epoch.
        drop_last: Leave out the last samples of an epoch that do not fill a batch.
    """

    path: list[str] = field(factory=list)
    weights: list[float] | None = None
    split: str = "100,0,0"
    validation_paths: dict[str, str] = field(factory=dict)
    messages_key: str = "messages"
    tools_key: str = "tools"
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    loss_on: Literal["completion", "assistant", "last_turn", "all"] = "assistant"
    append_eod: bool = True
    truncation: Literal["right", "left", "skip", "error"] = "right"
    bad_records: Literal["error", "skip"] = "error"
    packing: Literal["none", "in_batch", "offline"] = "none"
    pad_to_multiple: int | None = number(None, ge=1)
    cache_dir: str | None = None
    seq_length: int | None = number(None, ge=1)
    dataloader_type: Literal["single", "cyclic"] = "cyclic"
    num_workers: int = number(0, ge=0)
    pin_memory: bool = True
    shuffle: bool = True
    drop_last: bool = True

    __attrs_post_init__ = check_all
    __repr__ = concise
