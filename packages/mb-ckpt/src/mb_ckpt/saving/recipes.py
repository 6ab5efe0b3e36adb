# SPDX-License-Identifier: Apache-2.0
"""From a plan to what each rank writes, and to the table of tensors in the manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from mb_ckpt.format.manifest import TensorEntry, TensorTable, encode_table, make_table
from mb_ckpt.format.zarr_arrays import (
    array_metadata,
    array_name,
    chunk_shape,
    is_shared,
    zarr_dtype,
)

if TYPE_CHECKING:
    from mb_ckpt.saving.planning import Plan
    from mb_ckpt.saving.writing import Task

Layout = Literal["packed", "zarr"]


@frozen(kw_only=True, eq=False)
class Recipe:
    """What follows from a plan alone, and is kept with it.

    Attributes:
        plan: The plan.
        table: Of the manifest; None on ranks other than 0.
        text: The table, encoded.
        arrays: In layout zarr, what this rank writes into which arrays.
        turns: In layout zarr, the same for chunks that several pieces share.
        any_turns: Whether any rank has such chunks.
    """

    plan: Plan
    table: TensorTable | None
    text: str
    arrays: tuple[dict[str, Any], ...] | None = None
    turns: tuple[dict[str, Any], ...] = ()
    any_turns: bool = False


def make_recipe(plan: Plan, rank: int, layout: Layout, compression: int | None) -> Recipe:
    """Return what *rank* does for *plan*.

    Args:
        plan: The same on all ranks.
        rank: Of this rank.
        layout: ``"packed"`` or ``"zarr"``.
        compression: Level of zstd, None for none.
    """
    if layout == "packed":
        table = _packed_table(plan) if rank == 0 else None
        return Recipe(plan=plan, table=table, text="" if table is None else encode_table(table))
    return _zarr_recipe(plan, rank, compression)


def packed_task(
    path: str, rank: int, nbytes: int, compression: int | None, *, read_soon: bool
) -> Task:
    """Return the task of writing a rank's bytes as one array below *path*."""
    return {
        "path": f"{path}/rank_{rank:05d}",
        "nbytes": nbytes,
        "compression": compression,
        "read_soon": read_soon,
    }


def _packed_table(plan: Plan) -> TensorTable:
    files, count = [], 0
    for total in plan.totals:
        files.append(count)
        count += total > 0
    return make_table(
        {
            key: TensorEntry(
                dtype=tensor.dtype,
                shape=tensor.shape,
                chunks=tuple(
                    (files[rank], start, box.offset, box.shape)
                    for rank, start, box in tensor.chunks
                ),
            )
            for key, tensor in plan.tensors.items()
        }
    )


def _zarr_recipe(plan: Plan, rank: int, compression: int | None) -> Recipe:
    entries, arrays, turns, any_turns = {}, [], [], False
    widths = _widths(plan)
    for key, tensor in plan.tensors.items():
        boxes = [box for _, _, box in tensor.chunks]
        width = widths[tensor.dtype]
        chunks = chunk_shape(tensor.shape, width, boxes)
        entries[key] = TensorEntry(dtype=tensor.dtype, shape=tensor.shape, chunk_shape=chunks)
        split = [is_shared(tensor.shape, chunks, box) for box in boxes]
        any_turns = any_turns or any(split)
        first = tensor.chunks[0][0] if tensor.chunks else 0
        alone: list[Any] = []
        common: list[Any] = []
        for (holder, start, box), shared in zip(tensor.chunks, split, strict=True):
            if holder == rank:
                (common if shared else alone).append([start, list(box.offset), list(box.shape)])
        if not (alone or common or first == rank):
            continue
        metadata = array_metadata(
            zarr_dtype(tensor.dtype, width), tensor.shape, chunks, compression
        )
        array = {"name": array_name(key), "metadata": metadata}
        arrays.append({**array, "first": first == rank, "boxes": alone})
        if common:
            turns.append({**array, "first": False, "boxes": common})
    table = make_table(entries) if rank == 0 else None
    return Recipe(
        plan=plan,
        table=table,
        text="" if table is None else encode_table(table),
        arrays=tuple(arrays),
        turns=tuple(turns),
        any_turns=any_turns,
    )


def _widths(plan: Plan) -> dict[str, int]:
    import torch

    return {t.dtype: getattr(torch, t.dtype).itemsize for t in plan.tensors.values()}
