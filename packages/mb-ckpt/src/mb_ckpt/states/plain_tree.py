# SPDX-License-Identifier: Apache-2.0
"""Plain Python data as JSON that gives back tuples, integer keys, nan and bytes exactly.

Beside what JSON has, the stored tree uses objects of one key that begins with ``$``:
``{"$tuple": [...]}``, ``{"$dict": [[key, value], ...]}`` (keys that are not all plain strings),
``{"$float": "nan" | "inf" | "-inf"}``, ``{"$bytes": base64}``, ``{"$tensor": key}``, which stands
where a tensor was, and ``{"$pickle": [class, base64]}`` for other objects where those who save ask for
it. Within objects of Megatron's, ``{"$numpy": [dtype, shape, base64]}`` and ``{"$torch": ...}`` are arrays, and
``{"$dtype": name}`` is a dtype of torch's. Reading a tree never runs a pickle: that takes a call of `Pickled.load`.
"""

from __future__ import annotations

import base64
import math
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen

from mb_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ABSENT: Any = object()
"""Stands where a tensor was, in a tree that is given back without tensors."""


@frozen(repr=False)
class Pickled:
    """An object that is stored as a pickle, as bytes: nothing of it has been run.

    Attributes:
        name: Module and name of its class, as whoever saved it says.
        data: The pickle.
    """

    name: str
    data: bytes

    @classmethod
    def of(cls, value: Any, path: str) -> Pickled:
        """Return *value* as a pickle.

        Raises:
            CheckpointError: If it cannot be pickled; names *path*.
        """
        kind = type(value)
        try:
            data = pickle.dumps(value, protocol=4)
        except Exception as e:
            raise CheckpointError(
                f"state {path!r} is a {kind.__name__}, which cannot be pickled: {e}"
            ) from e
        return cls(f"{kind.__module__}.{kind.__qualname__}", data)

    def load(self) -> Any:
        """Return the object. This runs whatever the pickle says."""
        try:
            return pickle.loads(self.data)  # noqa: S301  # asked for by name
        except Exception as e:
            raise CheckpointError(f"a stored {self.name} cannot be unpickled: {e}") from e

    def __repr__(self) -> str:
        return f"<pickled {self.name}, {len(self.data)} bytes>"


SCALARS = (type(None), bool, str, int, float, bytes, bytearray, Pickled)
"""What `encode_scalar` takes."""


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
    if isinstance(value, Pickled):
        return {"$pickle": [value.name, base64.b64encode(value.data).decode()]}
    raise CheckpointError(
        f"state {path!r} is a {type(value).__name__}, which cannot be stored: give tensors, "
        "TensorShards, plain Python data, or objects with state_dict and load_state_dict; or allow "
        "pickles, where you will trust who wrote the checkpoint"
    )


def encode_array(value: np.ndarray[Any, Any] | torch.Tensor) -> Any:
    """Return a small array or tensor as JSON data."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes()
        name, shape = str(data.dtype).removeprefix("torch."), list(data.shape)
        return {"$torch": [name, shape, base64.b64encode(raw).decode()]}
    little = value.astype(value.dtype.newbyteorder("<"))
    return {
        "$numpy": [little.dtype.str, list(value.shape), base64.b64encode(little.tobytes()).decode()]
    }


def _tensor_of(value: list[Any]) -> torch.Tensor:
    name, shape, text = value
    raw, dtype = base64.b64decode(text), getattr(torch, name)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(shape)


def _array_of(value: list[Any]) -> np.ndarray[Any, Any]:
    name, shape, raw = value
    array = np.frombuffer(bytearray(base64.b64decode(raw)), name).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="))


_VALUES: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$bytes": base64.b64decode,
    "$numpy": _array_of,
    "$torch": _tensor_of,
    "$dtype": lambda name: getattr(torch, name),
}


def encode_items(items: list[tuple[Any, Any]]) -> Any:
    """Return a mapping of already encoded values as JSON data; keys are strings or plain scalars."""
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
        return dict(items)
    return {"$dict": [[encode_scalar(key, f"key {key!r}"), value] for key, value in items]}


def decode(  # noqa: PLR0911  # one return a kind of node
    tree: Any, tensors: Mapping[str, Any] | None = None, *, unpickle: bool = False
) -> Any:
    """Return the Python data of a stored tree.

    Args:
        tree: JSON data.
        tensors: What to put where tensors were, by key. None leaves them out: entries of mappings
            disappear, as do sequences of tensors only, and elsewhere in a sequence stands None.
        unpickle: Whether to run pickles. Else `Pickled` objects stand in their places.
    """
    if isinstance(tree, list):
        return _decode_sequence(tree, tensors, unpickle=unpickle)
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        tag, value = next(iter(tree.items()))
        if tag == "$tensor":
            return ABSENT if tensors is None else tensors[value]
        if tag == "$tuple":
            items = _decode_sequence(value, tensors, unpickle=unpickle)
            return items if items is ABSENT else tuple(items)
        if tag in _VALUES:
            return _VALUES[tag](value)
        if tag == "$pickle":
            found = Pickled(value[0], base64.b64decode(value[1]))
            return found.load() if unpickle else found
    decoded = ((decode(k), decode(v, tensors, unpickle=unpickle)) for k, v in items_of(tree))
    return {k: v for k, v in decoded if v is not ABSENT}


def _decode_sequence(tree: list[Any], tensors: Mapping[str, Any] | None, *, unpickle: bool) -> Any:
    items = [decode(item, tensors, unpickle=unpickle) for item in tree]
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


def pickled(tree: Any, path: str = "") -> dict[str, str]:
    """Return the classes of all pickles in the stored *tree*, by dotted path."""
    if isinstance(tree, dict) and tree.keys() == {"$pickle"}:
        return {path: tree["$pickle"][0]}
    found: dict[str, str] = {}
    for key, value in items_of(tree):
        found |= pickled(value, f"{path}.{key}" if path else str(key))
    return found
