# SPDX-License-Identifier: Apache-2.0
"""Filling a nested state from one step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mb_ckpt import plain_tree
from mb_ckpt.catalogue import step_name
from mb_ckpt.errors import CheckpointError
from mb_ckpt.reader import check, fill, listing
from mb_ckpt.state import Piece, Stateful, flatten, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_ckpt.interfaces import Store
    from mb_ckpt.manifest import Manifest


def load(store: Store, manifest: Manifest, state: Mapping[str, Any]) -> dict[str, Any]:
    """Fill *state* from the step of *manifest*; see `CheckpointStore.load`."""
    flat = flatten(state, loading=True)
    place = f"{store.url}/{step_name(manifest.step)}"
    for module in flat.modules:
        _check_keys(manifest, module, flat.pieces, place)
    trees = [_subtree(manifest, item, place) for item in flat.statefuls]
    fresh = {key: _empty(manifest, key) for tree in trees for key in plain_tree.tensor_keys(tree)}
    pieces = [*flat.pieces, *(whole(tensor, key) for key, tensor in fresh.items())]
    check(manifest, pieces, place)
    fill(store, manifest, pieces)
    for item, tree in zip(flat.statefuls, trees, strict=True):
        item.target.load_state_dict(plain_tree.decode(tree, fresh))
    for module in flat.modules:
        _load_extra(manifest, module)
    return plain_tree.decode(manifest.tree) or {}


def _check_keys(manifest: Manifest, module: Stateful, pieces: list[Piece], place: str) -> None:
    """Refuse a module that is not the one that was saved: neither less nor more."""
    prefix = ".".join((*module.path, ""))
    stored = {key for key in manifest.tensors if key.startswith(prefix)}
    wanted = {piece.key for piece in pieces if piece.plain and piece.key.startswith(prefix)}
    if stored == wanted:
        return
    parts = []
    if wanted - stored:
        parts.append(f"{place} lacks {listing(sorted(wanted - stored))}")
    if stored - wanted:
        parts.append(f"the module lacks {listing(sorted(stored - wanted))}")
    name = ".".join(module.path) or "state"
    raise CheckpointError(f"{name!r} is not the module that was saved: {'; '.join(parts)}")


def _subtree(manifest: Manifest, item: Stateful, place: str) -> Any:
    tree = plain_tree.find(manifest.tree, item.path)
    if tree is plain_tree.ABSENT or tree is None:
        raise CheckpointError(
            f"{place} lacks {'.'.join(item.path)!r}, the state of a {type(item.target).__name__}: "
            "leave it out of what is loaded"
        )
    return tree


def _empty(manifest: Manifest, key: str) -> torch.Tensor:
    entry = manifest.tensors[key]
    return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))


def _load_extra(manifest: Manifest, module: Stateful) -> None:
    """Give a module the plain data of its state (``get_extra_state``); its tensors are filled."""
    tree = plain_tree.find(manifest.tree, module.path)
    plain = None if tree is plain_tree.ABSENT else plain_tree.decode(tree)
    if plain:
        module.target.load_state_dict({**module.target.state_dict(), **plain})
