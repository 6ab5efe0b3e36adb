# SPDX-License-Identifier: Apache-2.0
"""Which layers each pipeline stage holds, from the model section alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from mb_config.sections.model import ModelConfig

_REPEATED_GROUP = re.compile(r"\(([^()]+)\)\*(\d+)")
_REPEATED_LETTER = re.compile(r"([EtmL|])\*(\d+)")
_LETTERS = re.compile(r"[EtmL|]*")
_LONGEST = 100_000


@frozen(kw_only=True)
class Chunk:
    """What one model chunk holds; a stage has one, or with interleaving several.

    Attributes:
        layers: Its transformer layers, from 0.
        embedding: Whether it begins with the embedding.
        mtp: How many layers that predict further ahead it holds.
        loss: Whether it ends with the final norm, output layer and loss.
    """

    layers: range
    embedding: bool = False
    mtp: int = 0
    loss: bool = False


def parse_layout(layout: str) -> list[str]:
    """Return the letters of every chunk of a ``pipeline_model_parallel_layout``, in layer order.

    Raises:
        ValueError: If *layout* has anything but ``E t m L | , ( ) *`` and numbers, or is out of
            balance.
    """
    text = "".join(layout.split()).replace(",", "")
    for pattern in (_REPEATED_GROUP, _REPEATED_LETTER):
        text = pattern.sub(lambda found: found[1] * min(int(found[2]), _LONGEST), text)
    if not _LETTERS.fullmatch(text) or len(text) > _LONGEST:
        raise ValueError(
            "must be written with E, t, m, L and |, repeated by x*n and (...)*n without nesting"
        )
    return text.split("|")


def stage_chunks(model: ModelConfig) -> list[list[Chunk]]:
    """Return the chunks of every pipeline stage: ``[stage][chunk]``.

    Chunk c of a stage follows chunk c of the stage before, and chunk c - 1 of the last stage.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2, in the order of megatron-core.

    Args:
        model: Resolved.
    """
    pp, vpp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    if model.pipeline_model_parallel_layout is not None:
        letters = parse_layout(model.pipeline_model_parallel_layout)
    else:
        letters = _even(model, vpp)
    chunks, start = [], 0
    for held in letters:
        stop = start + held.count("t")
        chunks.append(
            Chunk(
                layers=range(start, stop),
                embedding="E" in held,
                mtp=held.count("m"),
                loss="L" in held,
            )
        )
        start = stop
    return [chunks[stage::pp] for stage in range(pp)]


def _even(model: ModelConfig, vpp: int) -> list[str]:
    """Return the letters of every chunk where no layout is given."""
    chunks = ["t" * (n // vpp) for _ in range(vpp) for n in layers_per_stage(model)]
    if model.account_for_embedding_in_pipeline_split:
        chunks[0] = chunks[0][1:]
    if model.account_for_loss_in_pipeline_split:
        chunks[-1] = chunks[-1][1:]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * (model.mtp_num_layers or 0) + "L"
    return chunks


def layers_per_stage(model: ModelConfig) -> list[int]:
    """Return the layers of every stage without an explicit layout.

    Where embedding or loss count as layers, they are among them.

    Args:
        model: Resolved.
    """
    pp = model.pipeline_model_parallel_size
    first = model.num_layers_in_first_pipeline_stage
    last = model.num_layers_in_last_pipeline_stage
    given = [n for n in (first, last) if n is not None]
    counted = model.num_layers + (
        model.account_for_embedding_in_pipeline_split + model.account_for_loss_in_pipeline_split
    )
    others = pp - len(given)
    counts = [(counted - sum(given)) // others if others else 0] * pp
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts
