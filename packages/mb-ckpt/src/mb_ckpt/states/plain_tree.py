# SPDX-License-Identifier: Apache-2.0
"""Plain Python data as JSON that gives back tuples, integer keys, nan and bytes exactly.

Beside what JSON has, the stored tree uses objects of one key that begins with ``$``:
``{"$tuple": [...]}``, ``{"$dict": [[key, value], ...]}`` (keys that are not all plain strings),
``{"$float": "nan" | "inf" | "-inf"}``, ``{"$bytes": base64}`` and ``{"$tensor": key}``, which stands
where a tensor was. Never pickle.
"""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING, Any

from mb_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

ABSENT: Any = object()
"""Stands where a tensor was, in a tree that is given back without tensors."""


def encode_scalar(value: Any, path: str) -> Any:
    """Return *value*, no container, as JSON data.

    Raises:
        CheckpointError: If it is nothing plain; names *path*.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode()}
    raise CheckpointError(
        f"state {path!r} is a {type(value).__name__}, which cannot be stored: give tensors, "
        "TensorShards, plain Python data, or objects with state_dict and load_state_dict"
    )


def encode_items(items: list[tuple[Any, Any]]) -> Any:
    """Return a mapping of already encoded values as JSON data; keys are strings or plain scalars."""
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
        return dict(items)
    return {"$dict": [[encode_scalar(key, f"key {key!r}"), value] for key, value in items]}


def decode(  # noqa: PLR0911  # one return a kind of node
    tree: Any, tensors: Mapping[str, Any] | None = None
) -> Any:
    """Return the Python data of a stored tree.

    Args:
        tree: JSON data.
        tensors: What to put where tensors were, by key. None leaves them out: entries of mappings
            disappear, as do sequences of tensors only, and elsewhere in a sequence stands None.
    """
    if isinstance(tree, list):
        return _decode_sequence(tree, tensors)
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        tag, value = next(iter(tree.items()))
        if tag == "$tensor":
            return ABSENT if tensors is None else tensors[value]
        if tag == "$tuple":
            items = _decode_sequence(value, tensors)
            return items if items is ABSENT else tuple(items)
        if tag == "$float":
            return float(value)
        if tag == "$bytes":
            return base64.b64decode(value)
    decoded = ((decode(k), decode(v, tensors)) for k, v in items_of(tree))
    return {k: v for k, v in decoded if v is not ABSENT}


def _decode_sequence(tree: list[Any], tensors: Mapping[str, Any] | None) -> Any:
    items = [decode(item, tensors) for item in tree]
    if items and all(item is ABSENT for item in items):
        return ABSENT
    return [None if item is ABSENT else item for item in items]


def items_of(tree: Any) -> list[tuple[Any, Any]]:
    """Return the entries of a stored mapping or sequence, not decoded; none of anything else."""
    if isinstance(tree, list):
        return list(enumerate(tree))
    if not isinstance(tree, dict):
        return []
    if len(tree) == 1:
        tag, value = next(iter(tree.items()))
        if tag == "$dict":
            return [(k, v) for k, v in value]
        if tag == "$tuple":
            return list(enumerate(value))
        if tag.startswith("$"):
            return []
    return list(tree.items())


def find(tree: Any, path: str) -> Any:
    """Return the stored subtree at the dotted *path*, not decoded, or `ABSENT`."""
    if not path:
        return tree
    for key, value in items_of(tree):
        name = str(key)
        if path == name:
            return value
        if path.startswith(f"{name}."):  # names may hold dots themselves
            found = find(value, path[len(name) + 1 :])
            if found is not ABSENT:
                return found
    return ABSENT


def tensor_keys(tree: Any) -> list[str]:
    """Return the keys of all tensors that stood in the stored *tree*."""
    if isinstance(tree, dict) and tree.keys() == {"$tensor"}:
        return [tree["$tensor"]]
    return [key for _, value in items_of(tree) for key in tensor_keys(value)]
