# SPDX-License-Identifier: Apache-2.0
"""What the ``mb.checkpointers`` entry point ``tensorstore`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mb_ckpt.errors import CheckpointError
from mb_ckpt.store import CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config import CheckpointConfig
    from mb_config.records import ProcessLayout

    from mb_ckpt.saving.saver import SaveHandle


class RunCheckpointer:
    """Saves a run in one place and loads it from the same or another one.

    Args:
        saves: Where to save, or None if the run does not.
        loads: Where to load, or None if there is nowhere.
    """

    def __init__(self, saves: CheckpointStore | None, loads: CheckpointStore | None) -> None:
        self._saves = saves
        self._loads = loads

    def save(self, step: int, state: Mapping[str, Any]) -> SaveHandle:
        """See `CheckpointStore.save`."""
        if self._saves is None:
            raise CheckpointError("checkpoint.save=None: set it to the directory to save in")
        return self._saves.save(step, state)

    def load(self, state: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
        """See `CheckpointStore.load`."""
        if self._loads is None:
            raise CheckpointError("checkpoint.load=None: set it to the directory to load from")
        return self._loads.load(state, step)

    def steps(self) -> list[int]:
        """Return the committed steps of the place to load from, ascending."""
        return [] if self._loads is None else self._loads.steps()

    def close(self) -> None:
        """Wait for the last save; see `CheckpointStore.close`."""
        stores = dict.fromkeys(s for s in (self._loads, self._saves) if s is not None)
        for store in stores:
            store.close()


def make_checkpointer(config: CheckpointConfig, layout: ProcessLayout) -> RunCheckpointer:
    """Return the checkpointer of a run; a collective call.

    Reads what *config* says of saving, and the group ``"world"`` of *layout*. Without ``load``, or
    with the same place as ``save``, steps are looked up and loaded where they are saved and in
    ``replicate_to``. ``most_recent_k=-1`` keeps every step, whatever the interval; the newest one is
    kept even with 0.
    """
    group = layout.groups.get("world")
    keeps_all = config.most_recent_k < 0
    copies_some = config.replica_most_recent_k > 0
    saves = None
    if config.save is not None:
        saves = CheckpointStore(
            config.save,
            keep_last=None if keeps_all else max(1, config.most_recent_k),
            keep_every=None if keeps_all else config.save_retain_interval,
            process_group=group,
            async_save=config.async_save,
            on_busy=config.async_queue,
            staging=config.staging,
            writer=config.writer,
            layout=config.layout,
            compression="zstd" if config.compression == "zstd" else None,
            compression_level=config.compression_level,
            replicate_to=config.replicate_to,
            replica_keep_last=config.replica_most_recent_k if copies_some else None,
        )
    if config.load is None or config.load == config.save:
        return RunCheckpointer(saves, saves)
    return RunCheckpointer(saves, CheckpointStore(config.load, process_group=group))
