# SPDX-License-Identifier: Apache-2.0
"""The buffers of Megatron-FSDP: which part of which parameter lies on which replica.

Parameters of one transformer layer form a group, and so do all others; experts are apart. A group is
one buffer, cut into equal parts at multiples of its parameters' rows, so that no row is cut.

Source: megatron-core 0.16.1, ``_get_parameter_groups`` and ``build_data_parallel_buffer_index`` of
Megatron-FSDP.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import frozen

from mb_engine.plan.layout import lcm_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mb_engine.plan.parameters import Parameter

_EXPERTS = ".experts."


@frozen(kw_only=True)
class ShardedBuffer:
    """The buffer of one group of parameters.

    Attributes:
        elements: With padding.
        used: Without padding.
        replicas: Ranks that it can be spread over.
        expert: Whether these are the ranks with the same experts.
        unit: Whether it is of a layer, and gathered when that runs; others are at the start.
        pieces: First element and elements of each parameter.
    """

    elements: int
    used: int
    replicas: int
    expert: bool
    unit: bool
    pieces: tuple[tuple[int, int], ...]

    def owned(self, replica: int) -> int:
        """Return how many elements of parameters lie in the part of one replica."""
        share = self.elements // self.replicas
        low, high = replica * share, (replica + 1) * share
        return sum(max(0, min(at + n, high) - max(at, low)) for at, n in self.pieces)


def sharded_buffers(
    parameters: Sequence[Parameter],
    *,
    replicas: int,
    expert_replicas: int,
    by_layer: bool,
    bucket_size: int | None,
) -> tuple[ShardedBuffer, ...]:
    """Return the buffers of a model chunk.

    Args:
        parameters: In the order of the model, named as in it.
        replicas: Ranks that hold the same dense parameters.
        expert_replicas: Ranks that hold the same experts.
        by_layer: Whether each transformer layer is a unit of its own, as where parameters are
            sharded too.
        bucket_size: Elements after which a buffer without a unit ends; None for no such limit.
    """
    groups: dict[tuple[bool, str], list[Parameter]] = {}
    for parameter in parameters:
        unit = _unit(parameter.name) if by_layer else ""
        groups.setdefault((_EXPERTS in parameter.name, unit), []).append(parameter)
    found = []
    for (expert, unit), members in groups.items():
        ranks = expert_replicas if expert else replicas
        found += [
            _buffer(bucket, ranks, expert=expert, unit=bool(unit))
            for bucket in _buckets(members, None if unit else bucket_size)
        ]
    return tuple(found)


def _unit(name: str) -> str:
    """Return the transformer layer that a parameter is of, empty for none."""
    at, _, inner = name.rpartition("transformer_layer.")
    if inner != name:
        return at
    parts = name.split(".")
    return parts[2] if parts[:2] == ["decoder", "layers"] else ""


def _buckets(parameters: Sequence[Parameter], bucket_size: int | None) -> Iterator[list[Parameter]]:
    bucket: list[Parameter] = []
    for parameter in parameters:
        if parameter.tied:
            if bucket:
                yield bucket
            yield [parameter]
            bucket = []
            continue
        bucket.append(parameter)
        if bucket_size and sum(p.size for p in bucket) >= bucket_size:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _buffer(
    parameters: Sequence[Parameter], replicas: int, *, expert: bool, unit: bool
) -> ShardedBuffer:
    ordered = sorted(parameters, key=lambda p: p.row, reverse=True)
    grid = _grid(ordered)
    pieces, end = _places([p.size for p in ordered], grid)
    return ShardedBuffer(
        elements=lcm_up(end, replicas * grid),
        used=sum(p.size for p in parameters),
        replicas=replicas,
        expert=expert,
        unit=unit,
        pieces=tuple(pieces),
    )


def _grid(ordered: Sequence[Parameter]) -> int:
    """Return the elements at whose multiples the buffer may be cut."""
    grid = ordered[0].row
    for parameter in ordered:
        whole = grid % parameter.row == 0 and parameter.size % grid == 0
        if parameter.row != grid and not whole and parameter.size >= grid:
            grid = math.lcm(grid, parameter.row)
    return grid


def _places(sizes: Sequence[int], grid: int) -> tuple[list[tuple[int, int]], int]:
    """Return first element and size of each parameter, and where the last one ends.

    What is shorter than the grid goes into gaps, or else to the end.
    """
    small = [n for n in sizes if n < grid]
    large = [n for n in sizes if n >= grid]
    pieces: list[tuple[int, int]] = []
    at = 0
    while large:
        size = large.pop(0)
        pieces.append((at, size))
        rest = size % grid
        if not rest:
            at += size
            continue
        gap, room = at + size, grid - rest
        at = lcm_up(gap, grid)
        partner = next((n for n in large if n % grid and rest + n % grid <= grid), None)
        if partner is not None:
            large.remove(partner)
            pieces.append((at - partner % grid, partner))
            room -= partner % grid
            at += partner // grid * grid
        for size in list(small):
            if size <= room:
                pieces.append((gap, size))
                room -= size
                gap += size
                small.remove(size)
    for size in small:
        pieces.append((at, size))
        at += size
    return pieces, at
