# SPDX-License-Identifier: Apache-2.0
"""Which tensors to take from one checkpoint into another, and what to call them there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attrs import field, frozen

from mb_ckpt.errors import CheckpointError
from mb_ckpt.loading.packed_reader import listing
from mb_ckpt.states.plain_tree import ABSENT
from mb_ckpt.states.storable import TensorToRead


@frozen(kw_only=True)
class Renaming:
    """A choice of keys, and their new names: filtered, stripped, renamed and added to, in this order.

    Attributes:
        prefix: Only keys that begin with this.
        strip: Taken off the beginning of keys that have it.
        rename: Beginnings of keys, without what was stripped, and what to put there; the longest
            that fits counts.
        add: Put before every key of a tensor.
    """

    prefix: str = ""
    strip: str = ""
    rename: Mapping[str, str] = field(factory=dict)
    add: str = ""

    def new_names(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the new name of each of *keys* that is taken.

        Raises:
            CheckpointError: If something of the renaming fits no key, or two keys get one name.
        """
        keys = list(keys)
        taken = [key for key in keys if key.startswith(self.prefix)]
        if self.prefix and not taken:
            raise CheckpointError(f"prefix={self.prefix!r} begins none of {_some(keys)}")
        if self.strip and not any(key.startswith(self.strip) for key in taken):
            raise CheckpointError(f"strip_prefix={self.strip!r} begins none of {_some(taken)}")
        short = [key.removeprefix(self.strip) for key in taken]
        for old in self.rename:
            if not any(key.startswith(old) for key in short):
                raise CheckpointError(f"rename {old!r} begins none of {_some(short)}")
        names: dict[str, str] = {}
        owners: dict[str, str] = {}
        for key in taken:
            name = self.add + self.renamed(key)
            if not name:
                raise CheckpointError(f"tensor {key!r} would have no name left: rename it")
            if name in owners:
                raise CheckpointError(
                    f"tensors {owners[name]!r} and {key!r} would both be {name!r}: rename one "
                    "otherwise"
                )
            names[key], owners[name] = name, key
        return names

    def renamed(self, key: str) -> str:
        """Return *key* with its beginning stripped and replaced."""
        key = key.removeprefix(self.strip)
        for old in sorted(self.rename, key=len, reverse=True):
            if key.startswith(old):
                return self.rename[old] + key[len(old) :]
        return key


def move(state: Mapping[str, Any], renaming: Renaming) -> dict[str, Any]:
    """Return *state* with its entries where *renaming* wants them.

    What is not renamed stays where it is. A mapping or sequence whose entries all go one way goes
    as a whole, plain data in it as well, to the top of the state under its dotted path. Plain data
    are chosen and renamed as tensors are; ``add`` counts for them in company of tensors.

    Raises:
        CheckpointError: If two things would have one name.
    """
    mover = _Mover(renaming)
    found = mover.entries(state, "")
    for path, value in mover.away:
        _put(found, path, value, path)
    return found


def tensors_in(value: Any, path: str = "") -> dict[str, TensorToRead]:
    """Return the tensors of a nested state by their dotted path.

    Raises:
        CheckpointError: If two have one path.
    """
    found: dict[str, TensorToRead] = {}
    _collect(value, path, found)
    return found


def without_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain data of a nested state, as `plain_tree.decode` leaves tensors out."""
    found = ((key, _plain(item)) for key, item in state.items())
    return {key: item for key, item in found if item is not ABSENT}


def _plain(value: Any) -> Any:
    if isinstance(value, TensorToRead):
        return ABSENT
    if isinstance(value, Mapping):
        return without_tensors(value)
    if not isinstance(value, (list, tuple)):
        return value
    items = [_plain(item) for item in value]
    if items and all(item is ABSENT for item in items):
        return ABSENT
    return type(value)([None if item is ABSENT else item for item in items])


def _collect(value: Any, path: str, found: dict[str, TensorToRead]) -> None:
    if isinstance(value, TensorToRead):
        if path in found:
            raise CheckpointError(f"two tensors of the state have the key {path!r}: rename one")
        found[path] = value
        return
    for key, item in _items(value):
        _collect(item, f"{path}.{key}" if path else str(key), found)


class _Mover:
    """One walk over a state.

    Attributes:
        away: What does not stay where it is, by its new path.
    """

    def __init__(self, renaming: Renaming) -> None:
        self.away: list[tuple[str, Any]] = []
        self._renaming = renaming

    def entries(self, value: Mapping[Any, Any], below: str) -> dict[Any, Any]:
        """Return the entries that stay."""
        visited = ((key, self._visit(item, f"{below}{key}")) for key, item in value.items())
        return {key: item for key, item in visited if item is not ABSENT}

    def _visit(self, value: Any, path: str) -> Any:
        """Return *value* if it stays, or what of it does, or `ABSENT`."""
        renaming, items = self._renaming, _items(value)
        below = f"{path}." if items else path
        if items and self._parts(below):
            return self._split(value, path)
        if not below.startswith(renaming.prefix):
            return ABSENT
        name = renaming.renamed(below)
        name = name[:-1] if items else name
        if renaming.add and _has_tensors(value):
            name = renaming.add + name
        if name == path:
            return value
        self.away.append((name, value))
        return ABSENT

    def _parts(self, below: str) -> bool:
        """Return whether what begins with *below* goes several ways."""
        strip, rename = self._renaming.strip, self._renaming.rename
        begins = (self._renaming.prefix, strip, *rename, *(strip + old for old in rename))
        if any(begin.startswith(below) and begin != below for begin in begins):
            return True
        name = self._renaming.renamed(below)
        return len(name) < 2 or not name.endswith(".")

    def _split(self, value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return self.entries(value, f"{path}.") or ABSENT
        for i, item in enumerate(value):  # one that stayed alone would have another number
            kept = self._visit(item, f"{path}.{i}")
            if kept is not ABSENT:
                self.away.append((f"{path}.{i}", kept))
        return ABSENT


def _items(value: Any) -> list[tuple[Any, Any]]:
    """Return the entries of a mapping or sequence; none of anything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def _has_tensors(value: Any) -> bool:
    if isinstance(value, TensorToRead):
        return True
    return any(_has_tensors(item) for _, item in _items(value))


def _put(into: dict[Any, Any], name: Any, value: Any, path: str) -> None:
    """Put *value* into a mapping, together with a mapping of the same name."""
    if name not in into:
        into[name] = value
        return
    if not (isinstance(into[name], Mapping) and isinstance(value, Mapping)):
        raise CheckpointError(f"two things would be {path!r}: rename one otherwise")
    into[name] = dict(into[name])
    for key, item in value.items():
        _put(into[name], key, item, f"{path}.{key}")


def _some(keys: list[str]) -> str:
    return f"{len(keys)} keys: {listing(keys, 5)}" if keys else "0 keys"
