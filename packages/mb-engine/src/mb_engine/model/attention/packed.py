# SPDX-License-Identifier: Apache-2.0
"""Samples laid end to end in one row: where each begins, on this rank and in each kernel call.

Shape suffixes: T = tokens of the row on this rank, n = samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from megatron.core.packed_seq_params import PackedSeqParams

from mb_engine.parallel.sequence import chunk_of_row, positions, rows_of_rank

if TYPE_CHECKING:
    from torch import Tensor

    from mb_engine.parallel.sequence import Packing


@frozen(kw_only=True, eq=False)
class Segments:
    """Rows of queries, each run of which attends to its own run of keys.

    Attributes:
        queries: Tokens of each run of queries.
        keys: Tokens of each run of keys, as many runs.
        cu_queries: Where each run begins, and the end; int32 ``[n + 1]`` on the device.
        cu_keys: The same for keys.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    cu_queries: Tensor
    cu_keys: Tensor


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron-core's description of a packed row, with what is known without asking the device.

    Attributes:
        lengths: Tokens of each sample, over all context-parallel ranks.
        cp: Context-parallel degree.
        cp_rank: This rank's coordinate.
    """

    lengths: tuple[int, ...] = ()
    cp: int = 1
    cp_rank: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, packing: Packing, *, device: torch.device, cp: int = 1, cp_rank: int = 0
    ) -> PackedSequences:
        """Return the description of a row for the kernels of one rank."""
        starts = torch.tensor((0, *packing.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        cu_seqlens = starts.to(device, non_blocking=True)
        # Transformer Engine asks for the padded boundaries under context parallelism; a sample's
        # padding is part of it here, so that they are the same.
        padded = cu_seqlens if cp > 1 else None
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=packing.max_length,
            max_seqlen_kv=packing.max_length,
            lengths=packing.lengths,
            cp=cp,
            cp_rank=cp_rank,
        )

    @property
    def chunks(self) -> int:
        """Into how many chunks each sample is cut."""
        return 2 * self.cp if self.cp > 1 else 1

    def segments(self, queries: int, keys: int) -> Segments:
        """Return runs of *queries* and *keys* chunks of each sample."""
        made: Segments = self._once(("segments", queries, keys), lambda: self._cut(queries, keys))
        return made

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return which of this rank's rows are of an earlier, and which of a later chunk."""
        return self._once(  # type: ignore[no-any-return]
            "halves", lambda: tuple(map(self._to_device, self._local_halves()))
        )

    def from_halves(self) -> Tensor:
        """Return where each of this rank's rows is among its earlier, then its later rows."""
        return self._once(  # type: ignore[no-any-return]
            "from halves", lambda: self._to_device(torch.cat(self._local_halves()).argsort())
        )

    def in_order(self) -> Tensor:
        """Return where each row of the whole is among the rows of rank 0, rank 1 and so on."""
        return self._once("order", lambda: self._to_device(self._gathered_order()))  # type: ignore[no-any-return]

    def back_in_parts(self) -> Tensor:
        """Return the rows of rank 0, rank 1 and so on; the inverse of :meth:`in_order`."""
        return self._once("parts", lambda: self._to_device(self._all_rows()))  # type: ignore[no-any-return]

    def prefix(self, chunks: int) -> Tensor:
        """Return where the first *chunks* chunks of each sample are among all ranks' rows."""

        def find() -> Tensor:
            chunk = chunk_of_row(self.lengths, self.chunks)
            return self._to_device(self._gathered_order()[chunk < chunks])

        return self._once(("prefix", chunks), find)  # type: ignore[no-any-return]

    def rotary_table(self, angles_S11D: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and signed sine ``[T, 1, 1, 1, D]`` of the position in its sample.

        Args:
            angles_S11D: Of the positions 0 to the longest sample's.
            dtype: Of the result.
        """
        from mb_engine.model.rotary import rotary_table

        def turn() -> tuple[Tensor, Tensor, Tensor]:
            tables = rotary_table(angles_S11D, dtype)
            rows = self._once("positions", lambda: self._to_device(self._local_positions()))
            # The angles are kept with the result: their address names it.
            cos, sin = (table.index_select(0, rows) for table in tables)
            return cos, sin, angles_S11D

        cos, sin, _ = self._once(("rotary", id(angles_S11D), dtype), turn)
        return cos, sin

    def _once(self, name: Any, make: Any) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def _cut(self, queries: int, keys: int) -> Segments:
        of_chunk = [length // self.chunks for length in self.lengths]
        one = self.cu_seqlens_q // self.chunks
        return Segments(
            queries=tuple(n * queries for n in of_chunk),
            keys=tuple(n * keys for n in of_chunk),
            cu_queries=one * queries,
            cu_keys=one * keys,
        )

    def _to_device(self, rows: Tensor) -> Tensor:
        return rows.to(self.cu_seqlens_q.device, non_blocking=True)

    def _all_rows(self) -> Tensor:
        parts = [rows_of_rank(self.lengths, cp=self.cp, cp_rank=r) for r in range(self.cp)]
        return torch.cat(parts)

    def _gathered_order(self) -> Tensor:
        return self._all_rows().argsort()

    def _local_positions(self) -> Tensor:
        rows = rows_of_rank(self.lengths, cp=self.cp, cp_rank=self.cp_rank)
        return positions(self.lengths)[rows]

    def _local_halves(self) -> tuple[Tensor, Tensor]:
        rows = rows_of_rank(self.lengths, cp=self.cp, cp_rank=self.cp_rank)
        early = chunk_of_row(self.lengths, self.chunks)[rows] == self.cp_rank
        return early.nonzero().flatten(), (~early).nonzero().flatten()
