# SPDX-License-Identifier: Apache-2.0
"""Rules of how layers are cut into pipeline stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_config.pipeline import layers_per_stage, parse_layout

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft

_LAYOUT = "model.pipeline_model_parallel_layout"
_ONLY_WITH_STAGES = (
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_OTHER_SPLITS = _ONLY_WITH_STAGES[1:3] + _ONLY_WITH_STAGES[4:]


def resolve(draft: Draft) -> None:
    """Check the cut, and derive the number of virtual stages from an explicit layout."""
    model = draft.config.model
    if model.pipeline_model_parallel_size == 1:
        for name in _ONLY_WITH_STAGES:
            draft.require(
                getattr(model, name) in {None, False},
                f"model.{name}",
                "needs pipeline parallelism, here pipeline_model_parallel_size=1",
                "leave it out, or raise model.pipeline_model_parallel_size",
            )
    elif model.num_layers >= 1:
        if model.pipeline_model_parallel_layout is not None:
            _explicit(draft, model.pipeline_model_parallel_layout)
        else:
            _by_numbers(draft)


def _explicit(draft: Draft, text: str) -> None:
    model = draft.config.model
    pp, vpp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    for name in _OTHER_SPLITS:
        draft.require(
            getattr(model, name) in {None, False},
            f"model.{name}",
            "pipeline_model_parallel_layout says which layers a stage holds",
            "leave one of them out",
        )
    try:
        chunks = parse_layout(text)
    except ValueError as error:
        draft.deny(_LAYOUT, str(error), 'write it as in "E|t*3|(t|)*3tt|m|L"')
        return
    if not draft.require(
        len(chunks) % pp == 0,
        _LAYOUT,
        f"has {len(chunks)} stages, not a multiple of pipeline_model_parallel_size={pp}",
        "add or join stages",
    ):
        return
    if len(chunks) > pp:
        draft.fill(
            "model.virtual_pipeline_model_parallel_size",
            len(chunks) // pp,
            f"{len(chunks)} stages of pipeline_model_parallel_layout / PP {pp}",
        )
    draft.require(
        (vpp or len(chunks) // pp) == len(chunks) // pp,
        "model.virtual_pipeline_model_parallel_size",
        f"pipeline_model_parallel_layout has {len(chunks)} stages for PP {pp}, that is"
        f" {len(chunks) // pp} each",
        "leave it out",
    )
    _contents(draft, chunks)


def _contents(draft: Draft, chunks: list[str]) -> None:
    model = draft.config.model
    layers, mtp = model.num_layers, model.mtp_num_layers or 0
    everything = "".join(chunks)
    draft.require(
        everything.count("t") == layers,
        _LAYOUT,
        f"has {everything.count('t')} layers t, model.num_layers is {layers}",
        "add or take away layers",
    )
    draft.require(
        everything.count("m") == mtp,
        _LAYOUT,
        f"has {everything.count('m')} layers m, model.mtp_num_layers is {mtp}",
        "add or take away layers m",
    )
    draft.require(
        everything.count("E") == 1
        and everything.count("L") == 1
        and chunks[0].startswith("E")
        and chunks[-1].endswith("L"),
        _LAYOUT,
        "must begin with its only E and end with its only L",
        "move them",
    )
    pp = model.pipeline_model_parallel_size
    holders = [i for i, held in enumerate(chunks) if "m" in held]
    draft.require(
        not holders
        or (
            len(holders) == 1
            and holders[0] >= max(1, len(chunks) - pp)
            and holders[0] % pp > 0
            and "t" not in everything[everything.index("m") :]
        ),
        _LAYOUT,
        "all layers m must be in one of the last stages of the pipeline, not of the first rank,"
        " after every t",
        "move them",
    )


def _by_numbers(draft: Draft) -> None:
    model = draft.config.model
    vpp = model.virtual_pipeline_model_parallel_size
    accounted = (
        model.account_for_embedding_in_pipeline_split + model.account_for_loss_in_pipeline_split
    )
    first = model.num_layers_in_first_pipeline_stage
    last = model.num_layers_in_last_pipeline_stage
    given = [n for n in (first, last) if n is not None]
    if not draft.require(
        not (accounted and given),
        "model.account_for_embedding_in_pipeline_split"
        if model.account_for_embedding_in_pipeline_split
        else "model.account_for_loss_in_pipeline_split",
        "does not go with numbers of layers of the first and last stage",
        "leave one of them out",
    ):
        return
    fits = _uneven(draft, first, last) if given else _even(draft, accounted)
    if not fits or vpp is None:
        return
    for layers in set(layers_per_stage(model)):
        if not draft.require(
            layers % vpp == 0,
            "model.virtual_pipeline_model_parallel_size",
            f"must divide the {layers} layers of a pipeline stage",
            "choose a divisor, or change model.num_layers",
        ):
            return


def _even(draft: Draft, accounted: int) -> bool:
    model = draft.config.model
    layers, pp = model.num_layers + accounted, model.pipeline_model_parallel_size
    more = f" with the {accounted} of embedding and loss" if accounted else ""
    up = max(1, -(-layers // pp)) * pp - accounted
    return draft.require(
        layers % pp == 0,
        "model.num_layers",
        f"must{more} be a multiple of pipeline_model_parallel_size={pp}",
        f"use {up} layers, or set model.num_layers_in_first_pipeline_stage",
    )


def _uneven(draft: Draft, first: int | None, last: int | None) -> bool:
    model = draft.config.model
    given = [n for n in (first, last) if n is not None]
    layers = model.num_layers - sum(given)
    places = model.pipeline_model_parallel_size - len(given)
    name = "first" if first is not None else "last"
    return draft.require(
        (layers == 0 if places == 0 else layers > 0 and layers % places == 0),
        f"model.num_layers_in_{name}_pipeline_stage",
        f"leaves {layers} of {model.num_layers} layers for {places} other stages",
        "choose numbers that leave a positive multiple of the other stages",
    )
