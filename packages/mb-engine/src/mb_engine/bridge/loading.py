# SPDX-License-Identifier: Apache-2.0
"""Weights from disk into the pieces of a model, a block of rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from mb_engine.bridge.errors import MappingError
from mb_engine.bridge.hub_format import DTYPES, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mb_config.records import TensorShard
    from torch import Tensor

    from mb_engine.bridge.family import Family
    from mb_engine.bridge.hub_format import HubTensors
    from mb_engine.bridge.mapping import Span, Table, Target

PREFIX = "model."
TIED_OUTPUT = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def check_names(table: Table, hub: HubTensors, chosen: Family) -> None:
    """Compare the tensors on disk with those that a table is about.

    Raises:
        MappingError: Listing every tensor that no rule takes, every one that is missing, and every
            one of another shape than the configuration says.
    """
    surplus = [
        name
        for name in hub.entries
        if name not in table.theirs
        and not name.endswith(chosen.constants)
        and not _is_copy(name, table, hub)
    ]
    missing = [name for name in table.theirs if name not in hub.entries]
    shapes = [
        f"{name} is {list(hub.entries[name].shape)}, config.json makes it {list(shape)}"
        for name, shape in table.theirs.items()
        if name in hub.entries and hub.entries[name].shape != shape
    ]
    said = [
        f"{what}: {listing(names)}"
        for what, names in (
            ("tensors that no rule of the family takes", surplus),
            ("tensors that are not there", missing),
            ("tensors of another shape", shapes),
        )
        if names
    ]
    if said:
        raise MappingError(
            f"{hub.folder}: does not fit its config.json as a model of the family {chosen.name};"
            f" {'; '.join(said)}"
        )


def _is_copy(name: str, table: Table, hub: HubTensors) -> bool:
    """Return whether *name* is an output layer that repeats the embedding it is tied to.

    Raises:
        MappingError: If it has other values.
    """
    if name != TIED_OUTPUT or EMBEDDING not in hub.entries or name in table.theirs:
        return False
    here, there = hub.entries[name], hub.entries[EMBEDDING]
    rows = here.shape[0] if here.shape else 0
    same = (here.dtype, here.shape) == (there.dtype, there.shape) and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for (_, a), (_, b) in zip(
            hub.read_rows(name, 0, rows), hub.read_rows(EMBEDDING, 0, rows), strict=True
        )
    )
    if not same:
        raise MappingError(
            f"{hub.folder}: {name} differs from {EMBEDDING} although config.json ties them; set"
            " tie_word_embeddings to false there"
        )
    return True


def check_shards(table: Table, shards: Iterable[TensorShard]) -> None:
    """Compare the pieces of a model with the tensors that a table fills.

    Raises:
        MappingError: Listing every piece that no tensor fills or that has another shape.
    """
    shapes = whole_shapes(table)
    wrong = [
        f"{shard.key} {list(shard.global_shape)}"
        + (f", the table has {list(shapes[key])}" if key in shapes else "")
        for shard in shards
        if shapes.get(key := shard.key.removeprefix(PREFIX)) != tuple(shard.global_shape)
    ]
    if wrong:
        raise MappingError(
            f"parameters that no tensor fills: {listing(wrong)}; the model section differs from the"
            " folder's config.json, or the table of the family lacks rules"
        )


def whole_shapes(table: Table) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of our tensors by key, with experts as the first dimension."""
    experts: dict[str, int] = {}
    for target in table.targets:
        if target.expert is not None:
            experts[target.key] = max(experts.get(target.key, 0), target.expert + 1)
    return {
        t.key: (experts[t.key], *t.shape) if t.expert is not None else t.shape
        for t in table.targets
    }


def by_key(table: Table) -> dict[tuple[str, int | None], Target]:
    """Return the targets by key and expert."""
    return {(target.key, target.expert): target for target in table.targets}


def fill(
    shard: TensorShard, targets: Mapping[tuple[str, int | None], Target], hub: HubTensors
) -> None:
    """Read the values of one piece of our model.

    Args:
        shard: Its ``data`` is written into, whatever its dtype and device.
        targets: From :func:`by_key`.
        hub: Where from; one block of rows at a time is in memory.
    """
    if shard.flat_range is None:
        box = shard.data
    else:
        box = torch.empty(shard.local_shape, dtype=shard.data.dtype, device=shard.data.device)
    with torch.no_grad():
        for target, offset, part in parts_of(shard, box, targets):
            _fill_matrix(target, offset, part, hub)
        if shard.flat_range is not None:
            start, stop = shard.flat_range
            shard.data.copy_(box.reshape(-1)[start:stop])


def rows_of(
    shard: TensorShard,
    start: int,
    stop: int,
    *,
    targets: Mapping[tuple[str, int | None], Target],
    hub: HubTensors,
) -> Tensor:
    """Return the rows ``start:stop`` of what :func:`fill` would write into a piece, on the CPU.

    Args:
        shard: Has no flat range; its ``data`` is not touched.
        start: First row of the piece.
        stop: After the last row.
        targets: From :func:`by_key`.
        hub: Where from.
    """
    local = (stop - start, *shard.local_shape[1:])
    values = torch.empty(local, dtype=shard.data.dtype)
    offset = (shard.offset[0] + start, *shard.offset[1:])
    part = attrs.evolve(shard, data=values, offset=offset, local_shape=local, read_rows=None)
    fill(part, targets, hub)
    return values


def parts_of(
    shard: TensorShard, box: Tensor, targets: Mapping[tuple[str, int | None], Target]
) -> Iterable[tuple[Target, tuple[int, ...], Tensor]]:
    """Yield what of *box* belongs to each target, and where it lies in that."""
    key = shard.key.removeprefix(PREFIX)
    if (key, None) in targets:
        yield targets[key, None], tuple(shard.offset), box
        return
    for place in range(shard.local_shape[0]):
        yield targets[key, shard.offset[0] + place], tuple(shard.offset[1:]), box[place]


def _fill_matrix(target: Target, offset: tuple[int, ...], part: Tensor, hub: HubTensors) -> None:
    first, last = offset[0], offset[0] + part.size(0)
    row = 0
    for span in target.spans:
        start, stop = max(first, row), min(last, row + span.rows)
        if start < stop:
            rows = part[start - first : stop - first]
            if span.name is None:
                rows.zero_()
            else:
                _read(hub, span, span.start + start - row, rows, offset)
        row += span.rows


def _read(hub: HubTensors, span: Span, begin: int, rows: Tensor, offset: tuple[int, ...]) -> None:
    """Read *rows* from row *begin* of a span's tensor on: straight, where they are as on disk."""
    name, index = span.name, span.index
    assert name is not None
    entry = hub.entries[name]
    shape = entry.shape if index is None else entry.shape[1:]
    as_there = rows.dtype == DTYPES[entry.dtype] and tuple(rows.shape[1:]) == shape[1:]
    if as_there and rows.device.type == "cpu" and rows.is_contiguous():
        hub.read_into(name, begin, rows, index=index)
        return
    for at, block in hub.read_rows(name, begin, begin + rows.size(0), index=index):
        for dim in range(1, block.dim()):
            block = block.narrow(dim, offset[dim], rows.size(dim))  # noqa: PLW2901
        rows[at - begin : at - begin + block.size(0)].copy_(block)
