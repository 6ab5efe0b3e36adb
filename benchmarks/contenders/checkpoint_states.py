# SPDX-License-Identifier: Apache-2.0
"""What is saved: three states, whole or split over ranks by rows. Imports no torch at the top."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    from torch import Tensor

KIB = 1 << 10
MIB = 1 << 20
# How many tensors of which size; alternately float32 and bfloat16.
_BIG = (
    (8, 32 * MIB), (16, 8 * MIB), (64, 2 * MIB), (112, 512 * KIB), (100, 16 * KIB), (100, 4 * KIB),
)  # fmt: skip
_SMALL = ((1000, 12 * KIB), (1000, 3 * KIB), (1000, 1 * KIB))
_MANY = ((3000, 12 * KIB), (3000, 3 * KIB), (4000, 1 * KIB))
SIZES = {"big": _BIG, "small": _SMALL, "10,000": _MANY}


@frozen
class Kind:
    """One tensor of a state.

    Attributes:
        name: Unique.
        rows, columns: Its shape.
        bf16: Whether bfloat16, else float32.
    """

    name: str
    rows: int
    columns: int
    bf16: bool

    @property
    def nbytes(self) -> int:
        return self.rows * self.columns * (2 if self.bf16 else 4)


def kinds(state: str) -> Iterator[Kind]:
    """Yield the tensors of the state *state*, a key of :data:`SIZES`."""
    index = 0
    for count, nbytes in SIZES[state]:
        for _ in range(count):
            bf16 = index % 2 == 1
            elements = nbytes // (2 if bf16 else 4)
            rows = 2 if nbytes < 64 * KIB else 1024
            yield Kind(f"model.layers.{index}.weight", rows, elements // rows, bf16)
            index += 1


def nbytes_of(state: str) -> int:
    """Return the bytes of the whole state."""
    return sum(count * nbytes for count, nbytes in SIZES[state])


@frozen(kw_only=True, eq=False)
class Pieces:
    """A state as one rank holds it.

    Attributes:
        local: This rank's rows by name.
        rank, ranks: Which part.
        mesh: The device mesh of all ranks; None with one.
    """

    local: dict[str, Tensor]
    rank: int
    ranks: int
    mesh: Any = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.local.values())

    def like(self) -> Pieces:
        """Return room for the same state, its pages already there."""
        import torch

        local = {name: torch.full_like(t, -1) for name, t in self.local.items()}
        return Pieces(local=local, rank=self.rank, ranks=self.ranks, mesh=self.mesh)

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Plain tensors with one rank, DTensors split by rows with several, as a model has them."""
        if self.ranks == 1:
            return dict(self.local)
        from torch.distributed.tensor import DTensor, Shard

        return {
            name: DTensor.from_local(t, self.mesh, [Shard(0)], run_check=False)
            for name, t in self.local.items()
        }

    @cached_property
    def megatron(self) -> dict[str, Any]:
        """megatron-core's sharded state dict."""
        from megatron.core.dist_checkpointing import ShardedTensor

        return {
            name: ShardedTensor.from_rank_offsets(name, t, (0, self.rank, self.ranks))
            for name, t in self.local.items()
        }


def pieces_of(state: str, rank: int, ranks: int, mesh: Any = None) -> Pieces:
    """Return the state's rows of *rank*: the same global values whatever *ranks* is."""
    import torch

    local = {}
    for index, kind in enumerate(kinds(state)):
        generator = torch.Generator().manual_seed(index)
        shape, dtype = (kind.rows, kind.columns), torch.bfloat16 if kind.bf16 else torch.float32
        whole = torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=generator)
        local[kind.name] = whole.chunk(ranks)[rank].clone()
    return Pieces(local=local, rank=rank, ranks=ranks, mesh=mesh)


def check_loaded(expected: Pieces, loaded: Pieces, who: str) -> None:
    """Compare bit for bit.

    Raises:
        ValueError: If anything differs.
    """
    import torch

    wrong = [
        name
        for name, t in expected.local.items()
        if not torch.equal(t.view(torch.uint8), loaded.local[name].view(torch.uint8))
    ]
    if wrong:
        raise ValueError(f"{who} loaded {len(wrong)} tensors wrong, the first {wrong[0]}")
