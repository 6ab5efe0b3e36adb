# SPDX-License-Identifier: Apache-2.0
"""What two steps have in common and where they differ, tensor by tensor."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from mb_config.records import TensorShard

from mb_ckpt.inspection import describe
from mb_ckpt.loading import matching as loading
from mb_ckpt.loading.matching import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from mb_ckpt.format.manifest import Manifest
    from mb_ckpt.interfaces import Store

_TOGETHER = 128 << 20
"""Bytes of one step read at once; a larger tensor is read alone."""


@frozen(kw_only=True)
class Changed:
    """A tensor whose values differ.

    Attributes:
        elements: How many differ; NaN equals NaN of the same bits.
        largest: Largest absolute difference, in float64; NaN where one has a NaN the other lacks.
    """

    elements: int
    largest: float


@frozen(kw_only=True)
class Comparison:
    """What was found.

    Attributes:
        equal: How many tensors are the same bit for bit.
        only_first: Keys that the second step lacks.
        only_second: Keys that the first step lacks.
        kinds: Dtype and shape in the first and in the second step, of keys where these differ.
        changed: What differs in tensors of the same dtype and shape.
        plain: Whether the plain data differ.
    """

    equal: int = 0
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    kinds: dict[str, tuple[str, str]] = field(factory=dict)
    changed: dict[str, Changed] = field(factory=dict)
    plain: bool = False

    @property
    def differs(self) -> bool:
        """Whether anything is not the same."""
        return bool(self.only_first or self.only_second or self.kinds or self.changed or self.plain)


def compare(
    first: tuple[Store, Manifest],
    second: tuple[Store, Manifest],
    *,
    prefix: str = "",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Comparison:
    """Return how two steps differ; every byte of both is read and checked.

    Host memory is that of twice the largest tensor, or of 256 MiB.

    Args:
        first: A place and the manifest of a step there.
        second: Another one.
        prefix: Only tensors whose keys begin with this; plain data count without one.
        progress: Called with the bytes of the first step read so far, and all that will be.

    Raises:
        CorruptCheckpointError: If stored bytes are damaged.
    """
    sides = [{k for k in side[1].tensors if k.startswith(prefix)} for side in (first, second)]
    kinds: dict[str, tuple[str, str]] = {}
    alike: list[str] = []
    for key in sorted(sides[0] & sides[1]):
        kind, there = first[1].tensors.kind(key), second[1].tensors.kind(key)
        if kind == there:
            alike.append(key)
        else:
            kinds[key] = _in_words(*kind), _in_words(*there)
    changed: dict[str, Changed] = {}
    total, done = sum(_nbytes(first[1], key) for key in alike), 0
    for keys in _groups(first[1], alike):
        one, other = _read(*first, keys), _read(*second, keys)
        for key, a, b in zip(keys, one, other, strict=True):
            if (difference := _difference(a, b)) is not None:
                changed[key] = difference
            done += a.nbytes
        progress(done, total)
    return Comparison(
        equal=len(alike) - len(changed),
        only_first=tuple(sorted(sides[0] - sides[1])),
        only_second=tuple(sorted(sides[1] - sides[0])),
        kinds=kinds,
        changed=changed,
        plain=not prefix and repr(describe(*first).plain) != repr(describe(*second).plain),
    )


def _groups(manifest: Manifest, keys: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for key in keys:
        size = _nbytes(manifest, key)
        if group and held + size > _TOGETHER:
            yield group
            group, held = [], 0
        group.append(key)
        held += size
    if group:
        yield group


def _nbytes(manifest: Manifest, key: str) -> int:
    dtype, shape = manifest.tensors.kind(key)
    return int(prod(shape) * getattr(torch, dtype).itemsize)


def _in_words(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'}"


def _read(place: Store, manifest: Manifest, keys: list[str]) -> list[Tensor]:
    rooms = []
    for key in keys:
        dtype, shape = manifest.tensors.kind(key)
        room = torch.empty(shape, dtype=getattr(torch, dtype))
        rooms.append(TensorShard.whole(key, room))
    state: dict[str, Any] = {"wanted": rooms}
    loading.load(place, manifest, state, LoadOptions())
    return [room.data for room in rooms]


def _difference(one: Tensor, other: Tensor) -> Changed | None:
    if not one.numel():
        return None
    a, b = (t.reshape(-1).view(torch.uint8).view(-1, t.element_size()) for t in (one, other))
    unequal = (a != b).any(dim=1)
    count = int(unequal.sum())
    if not count:
        return None
    wide = torch.complex128 if one.is_complex() else torch.float64
    x, y = (t.reshape(-1)[unequal].to(wide) for t in (one, other))
    return Changed(elements=count, largest=float((x - y).abs().max()))
