# SPDX-License-Identifier: Apache-2.0
"""Between a Hugging Face folder and a checkpoint, in one process and without a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from mb_config import CheckpointConfig, ConfigContainer
from mb_config.records import ProcessLayout, TensorShard

from mb_engine.bridge.config import config_from_hf
from mb_engine.bridge.errors import BridgeError
from mb_engine.bridge.live import open_folder
from mb_engine.bridge.loading import PREFIX, by_key, rows_of, whole_shapes
from mb_engine.bridge.source import (
    read_config,
    read_source,
    shards_to_fill,
    source_of,
    with_source,
)
from mb_engine.bridge.writing import Outgoing

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from mb_config import ModelConfig

    from mb_engine.bridge.mapping import Table, Target
    from mb_engine.bridge.source import HubSource
    from mb_engine.interfaces import Checkpointer

_BATCH_BYTES = 64 << 20


def import_hf(
    folder: str | os.PathLike[str], save: str | os.PathLike[str], *, backend: str = "tensorstore"
) -> ConfigContainer:
    """Write the weights of a Hugging Face folder as step 0 of a checkpoint, which any layout loads.

    Needs neither a GPU nor a model in memory: weights are read when they are written, a block of
    rows at a time, into the dtype of the folder's ``config.json``.

    Args:
        folder: With ``config.json`` and safetensors files.
        save: Folder or URL of the checkpoint.
        backend: Name of the checkpoint writer in the entry-point group ``mb.checkpointers``; it
            must take shards with ``read_rows``.

    Returns:
        The configuration of the model, as :func:`mb_engine.bridge.config_from_hf` returns it.

    Raises:
        HubFormatError: If a file is missing or damaged.
        UnknownFamilyError: If there is no mapping for the architecture.
        MappingError: If ``config.json`` and tensors do not fit; lists all that is wrong.
    """
    from mb_engine.train import state as train_state

    folder = Path(folder)
    config = config_from_hf(folder)
    resolved = _resolved(config)
    shards, source = _unread(folder, resolved.model)
    layout = ProcessLayout()
    run = train_state.plain_state(resolved, layout, train_state.TrainState())
    run |= {"has_rng": False, "scaling_history": []}
    own = CheckpointConfig(save=str(save), backend=backend, staging="eager", writer="thread")
    state = with_source({"model": shards, "run": run}, source, rank=0)
    checkpointer = _checkpointer(own)
    checkpointer.save(0, state).result()
    _close(checkpointer)
    return config


def _unread(folder: Path, model: ModelConfig) -> tuple[list[TensorShard], HubSource]:
    """Return all tensors of *folder* as shards that are read when they are written."""
    dtype = getattr(torch, model.params_dtype or "float32")
    table = read_config(folder)[1].table(model, _names(folder))
    shards = [
        _shard(key, shape, torch.empty(shape, dtype=dtype, device="meta"))
        for key, shape in whole_shapes(table).items()
    ]
    table, hub = open_folder(shards, model, folder)
    targets = by_key(table)
    read = [partial(rows_of, shard, targets=targets, hub=hub) for shard in shards]
    pairs = zip(shards, read, strict=True)
    return [attrs.evolve(shard, read_rows=one) for shard, one in pairs], read_source(folder, hub)


def export_hf(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    backend: str = "tensorstore",
) -> None:
    """Write a checkpoint of any layout as a Hugging Face folder.

    The checkpoint says all that is needed: the model and, if its weights began in a Hugging Face
    folder, names, dtypes, configuration and tokenizer files of that. A few tensors at a time are in
    memory.

    Args:
        checkpoint: Folder or URL.
        folder: Made if it is not there.
        step: Which one; None for the newest.
        dtype: Of the weights of a model that was trained from scratch; None for that of the
            parameters.
        family: Of such a model; None finds one.
        backend: Name of the checkpoint reader in the entry-point group ``mb.checkpointers``.

    Raises:
        BridgeError: If there is no checkpoint, or it is none of a training run.
        MappingError: If no family has such a model.
    """
    reader = _checkpointer(CheckpointConfig(load=str(checkpoint), backend=backend))
    steps = reader.steps()
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, steps)) or "none"
        raise BridgeError(
            f"{checkpoint}: holds no complete step{'' if step is None else f' {step}'}; there are"
            f" {there}"
        )
    step = steps[-1] if step is None else step
    run = reader.load({}, step).get("run")
    if run is None or "config" not in run:
        raise BridgeError(f"{checkpoint}: was not saved by a training run of this engine")
    config = ConfigContainer.from_dict(run["config"])
    if config.peft is not None:
        raise BridgeError(
            f"{checkpoint}: holds a model with adapters (peft); merge them before it is exported"
        )
    hub = shards_to_fill(run, rank=0)
    if hub:
        reader.load({"hub": hub}, step)
    outgoing = Outgoing(config.model, source_of(hub), dtype=dtype, name=family)
    own = getattr(torch, config.model.params_dtype or "float32")
    outgoing.write(Path(folder), _read(reader, step, outgoing.table, own))


def _read(
    reader: Checkpointer, step: int, table: Table, dtype: torch.dtype
) -> Iterator[tuple[Target, torch.Tensor]]:
    """Yield every target with its values, reading several small ones at once."""
    shapes = whole_shapes(table)
    batch: list[tuple[Target, TensorShard]] = []
    size = 0
    for target in by_key(table).values():
        values = torch.empty(target.shape, dtype=dtype)
        if batch and size + values.nbytes > _BATCH_BYTES:
            yield from _loaded(reader, step, batch)
            batch, size = [], 0
        batch.append((target, _shard(target.key, shapes[target.key], values, target.expert)))
        size += values.nbytes
    yield from _loaded(reader, step, batch)


def _loaded(
    reader: Checkpointer, step: int, batch: list[tuple[Target, TensorShard]]
) -> Iterator[tuple[Target, torch.Tensor]]:
    reader.load({"model": [shard for _, shard in batch]}, step)
    for target, shard in batch:
        yield target, shard.data.view(target.shape)


def _shard(
    key: str, shape: tuple[int, ...], values: torch.Tensor, expert: int | None = None
) -> TensorShard:
    """Return the record of a whole tensor, or of one expert's matrix."""
    alone = expert is not None
    local = (1, *shape[1:]) if alone else shape
    return TensorShard(
        key=PREFIX + key,
        data=values.view(local),
        global_shape=shape,
        offset=((expert or 0), *(0,) * (len(shape) - 1)),
        local_shape=local,
        dtype=str(values.dtype).removeprefix("torch."),
    )


def _resolved(config: ConfigContainer) -> ConfigContainer:
    """Return *config* resolved for one rank, with what a run would have to say besides."""
    asked = ConfigContainer(
        model=config.model,
        mixed_precision=config.mixed_precision,
        tokenizer=config.tokenizer,
    )
    return asked.override("dataset.type=mock", "train.train_iters=1").finalize(1)


def _names(folder: Path) -> Any:
    from mb_engine.bridge.hub_format import open_tensors

    return open_tensors(folder).entries


def _close(checkpointer: Checkpointer) -> None:
    """Let others write there, where that is a matter at all."""
    close = getattr(checkpointer, "close", None)
    if close is not None:
        close()


def _checkpointer(config: CheckpointConfig) -> Checkpointer:
    from mb_engine.compose import load_plugin

    setting = f"checkpoint.backend={config.backend!r}"
    make = load_plugin("mb.checkpointers", config.backend, setting=setting, extra="ckpt")
    made: Checkpointer = make(config, ProcessLayout())
    return made
