# SPDX-License-Identifier: Apache-2.0
"""A model on its ranks, from and to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mb_engine.bridge.config import mismatches, model_from_hf
from mb_engine.bridge.errors import MappingError
from mb_engine.bridge.hub_format import open_tensors
from mb_engine.bridge.loading import by_key, check_names, check_shards, fill, parts_of, whole_shapes
from mb_engine.bridge.source import read_config, read_source
from mb_engine.bridge.writing import Outgoing, whole_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from mb_config import ModelConfig
    from mb_config.records import TensorShard
    from torch import Tensor

    from mb_engine.bridge.hub_format import HubTensors
    from mb_engine.bridge.mapping import Table, Target
    from mb_engine.bridge.source import HubSource
    from mb_engine.train.engine import Engine


def load_hf(engine: Engine, folder: str | os.PathLike[str]) -> HubSource:
    """Take over the weights of a Hugging Face folder, in whatever layout the engine has.

    Every rank reads its own part, a block of rows at a time. The engine keeps what is needed to
    make such a folder again: its checkpoints can be exported without this one.

    Args:
        engine: Its model section must describe the folder's model.
        folder: With ``config.json`` and safetensors files.

    Returns:
        What is kept.

    Raises:
        HubFormatError: If a file is missing or damaged.
        UnknownFamilyError: If there is no mapping for the architecture.
        MappingError: If model, ``config.json`` and tensors do not fit; lists all that is wrong.
    """
    from mb_engine.precision import quantized

    with quantized.plain_parameters(engine.model) as copies:
        source = fill_shards(engine.model_shards(), engine.config.model, Path(folder))
    quantized.quantize_again(copies)
    if engine.config.ddp.use_megatron_fsdp:
        for chunk in engine.chunks:
            chunk.take_over(main_params=False)
    else:
        engine.optimizer.reload_model_params()
    engine.hub = source
    return source


def fill_shards(shards: Sequence[TensorShard], model: ModelConfig, folder: Path) -> HubSource:
    """Read *folder* into the pieces of a model; see :func:`load_hf`.

    Args:
        shards: A rank's pieces, with keys that begin with ``model.``.
        model: The resolved model section.
        folder: With ``config.json`` and safetensors files.
    """
    table, hub = open_folder(shards, model, folder)
    targets = by_key(table)
    for shard in shards:
        fill(shard, targets, hub)
    return read_source(folder, hub)


def open_folder(
    shards: Sequence[TensorShard], model: ModelConfig, folder: Path
) -> tuple[Table, HubTensors]:
    """Return the mapping of *folder* and its tensors, once all is known to fit; see `fill_shards`.

    Raises:
        BridgeError: As :func:`load_hf`.
    """
    config, chosen = read_config(folder)
    theirs = model_from_hf(config, chosen, where=folder / "config.json")
    differences = mismatches(model, theirs)
    if differences:
        raise MappingError(
            f"{folder}: holds another model than the model section: {'; '.join(differences)}; take"
            " the section from mb_engine.bridge.config_from_hf"
        )
    hub = open_tensors(folder)
    table = chosen.table(model, hub.entries)
    check_names(table, hub, chosen)
    check_shards(table, shards)
    return table, hub


def export_model(
    engine: Engine,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
) -> None:
    """Write the engine's weights as a Hugging Face folder; all ranks call it, rank 0 writes.

    Args:
        engine: Whose model it is; a folder that it came from gives names, dtypes and files.
        folder: Made if it is not there.
        dtype: Of the weights of a model that was trained from scratch; None for that of the
            parameters.
        family: Of such a model; None finds one.

    Raises:
        MappingError: If no family has such a model.
    """
    outgoing = Outgoing(engine.config.model, engine.hub, dtype=dtype, name=family)
    tensors = _gathered(engine, outgoing.table)
    if engine.layout.rank == 0:
        outgoing.write(Path(folder), tensors)
    else:
        for _ in tensors:
            pass
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def stream_hf(engine: Engine, *, family: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the engine's weights as Hugging Face names and tensors; all ranks call it together.

    Every rank gets every tensor, in the dtype of the parameters, on its device; one of our tensors
    is gathered at a time. All ranks must take all of them.

    Args:
        engine: Whose model it is.
        family: Of a model that did not come from a folder; None finds one.

    Raises:
        MappingError: If no family has such a model.
    """
    outgoing = Outgoing(engine.config.model, engine.hub, name=family)
    yield from whole_tensors(outgoing.table, _gathered(engine, outgoing.table))


def _gathered(engine: Engine, table: Table) -> Iterator[tuple[Target, Tensor]]:
    """Yield every target with all its rows, on every rank; one after the other."""
    from mb_engine.precision import quantized

    with (
        torch.no_grad(),
        engine.synced_parameters(),
        quantized.plain_parameters(engine.model),
    ):
        shards = engine.model_shards()
        check_shards(table, shards)
        targets = by_key(table)
        own: dict[tuple[str, int | None], list[tuple[tuple[int, ...], TensorShard]]] = {}
        for shard in shards:
            if shard.replica_id == 0:
                for key, offset in _places(shard, targets):
                    own.setdefault(key, []).append((offset, shard))
        dtype = getattr(torch, engine.config.model.params_dtype or "float32")
        for target in table.targets:
            key = (target.key, target.expert)
            values = torch.zeros(target.shape, dtype=dtype, device=engine.layout.device)
            for _, shard in own.get(key, ()):
                _place(shard, target, values, targets)
            yield target, _from_all_ranks(values)


def _places(
    shard: TensorShard, targets: dict[tuple[str, int | None], Target]
) -> Iterator[tuple[tuple[str, int | None], tuple[int, ...]]]:
    empty = torch.empty(shard.local_shape, device="meta")
    for target, offset, _ in parts_of(shard, empty, targets):
        yield (target.key, target.expert), offset


def _place(
    shard: TensorShard,
    target: Target,
    values: Tensor,
    targets: dict[tuple[str, int | None], Target],
) -> None:
    """Write what *shard* has of *target* to its place in *values*."""
    if shard.flat_range is None:
        box: Tensor = shard.data
    else:
        start, stop = shard.flat_range
        box = torch.zeros(shard.local_shape, dtype=shard.data.dtype, device=shard.data.device)
        box.view(-1)[start:stop] = shard.data
    for other, offset, part in parts_of(shard, box, targets):
        if other is target:
            place: Any = tuple(
                slice(start, start + extent)
                for start, extent in zip(offset, part.shape, strict=True)
            )
            if shard.flat_range is None:
                values[place] = part
            else:
                values[place] += part


def _from_all_ranks(values: Tensor) -> Tensor:
    """Return the sum over ranks, of which one has a value for each element and the others zeros.

    The sum is of bytes, which leaves every bit as it is, the sign of zero and nan included.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values.view(-1).view(torch.uint8))
    return values


__all__ = ["export_model", "fill_shards", "load_hf", "open_folder", "stream_hf", "whole_shapes"]
