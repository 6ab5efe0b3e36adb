# SPDX-License-Identifier: Apache-2.0
"""What one rank writes of one save, done here or in a process of its own. Imports no torch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from mb_ckpt.format.local_writer import is_local
from mb_ckpt.format.packed import Grid, encode_metadata, write_array
from mb_ckpt.format.zarr_arrays import GROUP, write_arrays

if TYPE_CHECKING:
    from mb_ckpt.format.tensorstore_io import Bytes
    from mb_ckpt.interfaces import Store
    from mb_ckpt.saving.on_demand import BytesOnDemand

Task = dict[str, Any]
"""JSON data: ``path``, ``nbytes``, ``compression``, ``read_soon`` and, in layout zarr, ``arrays``."""


def perform(store: Store, task: Task, data: Bytes | BytesOnDemand) -> dict[str, Any] | None:
    """Write *data* as *task* says; durable on return.

    Args:
        store: The place.
        task: With ``arrays``, as `mb_ckpt.format.zarr_arrays.write_arrays` takes them, boxes are written
            into arrays below ``path``; without, all of *data* becomes the packed array ``path``.
        data: The staged bytes, ``nbytes`` long.

    Returns:
        The packed array as the manifest has it: ``path``, ``nbytes``, ``inner``, ``shard`` and
        ``sha256``. None if there is none.

    Raises:
        OSError: If the storage refuses.
        ValueError: As tensorstore says it.
    """
    path = task["path"]
    if "arrays" in task:
        write_arrays(store.kvstore, path, data, task["arrays"])
        store.settle(path)
        if task["group"]:
            store.publish(f"{path}/zarr.json", GROUP)
        return None
    if not len(data):
        return None
    local = is_local(store.kvstore, task["compression"])
    grid = Grid.of(len(data), task["compression"], local=local)
    write_array(store.kvstore, path, data, grid, read_soon=task["read_soon"])
    # Last and by publish, which makes the directories durable as well.
    metadata = encode_metadata(grid)
    store.publish(f"{path}/zarr.json", metadata)
    return {
        "path": path.rsplit("/", maxsplit=1)[1],
        "nbytes": grid.nbytes,
        "inner": grid.inner,
        "shard": grid.shard,
        "sha256": hashlib.sha256(metadata).hexdigest(),
    }
