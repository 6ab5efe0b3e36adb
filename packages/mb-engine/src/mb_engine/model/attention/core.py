# SPDX-License-Identifier: Apache-2.0
"""The core attention of the torch layer spec, for any device.

It takes the place of megatron-core's ``DotProductAttention`` in a layer spec: the same softmax over
the same scores, without the ``[B, N, S, S]`` tensors, for packed rows, and with context parallelism.

Shape suffixes, all local to the rank: S = query tokens, T = key tokens, B = micro-batch,
N = query heads, G = key and value heads, D = width of a query and key, E = width of a value.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn import functional

from mb_engine.errors import EngineError
from mb_engine.model.attention import exchange
from mb_engine.model.attention.blocks import block_kernel
from mb_engine.model.attention.local import attend, attend_segments
from mb_engine.model.attention.packed import PackedSequences
from mb_engine.model.attention.ring import ring_attention
from mb_engine.model.attention.scoring import Scoring
from mb_engine.runtime.seeding import CONTEXT_PARALLEL

if TYPE_CHECKING:
    from torch import Tensor

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_EXCHANGES = ("p2p", "all_gather", "a2a")
_NOTHING = contextlib.nullcontext()


class TorchAttention(MegatronModule):  # type: ignore[misc]
    """Softmax attention of this rank's heads; grouped queries, windows, caps, dropout, CP, packing.

    Under tensor parallelism a rank has N of all heads and draws dropout from the tracker's
    model-parallel state, so that ranks drop different entries; under context parallelism from a
    state in which all these ranks differ. Under context parallelism it has two
    chunks of each sequence in zig-zag order (:mod:`mb_engine.parallel.sequence`), and keys and
    values come from the other ranks in one of three ways, ``cp_comm_type``:

    - ``p2p``: around a ring, one block after the other (:mod:`mb_engine.model.attention.ring`);
    - ``all_gather``: all at once; each chunk attends to the keys up to its own end, which is the
      same work on every rank. Source: Llama 3, arXiv:2407.21783, section 3.3.2;
    - ``a2a``: each rank gets all tokens of a part of the heads. Source: arXiv:2309.14509.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped queries: Ainslie et al. 2023,
    arXiv:2305.13245.
    """

    def __init__(  # noqa: PLR0917 - megatron-core's call
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_kwargs: Any,
    ) -> None:
        """Take what megatron-core's ``SelfAttention`` gives to its core attention.

        Raises:
            EngineError: If the configuration asks for what these kernels do not compute.
        """
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.scoring = Scoring(
            scale=softmax_scale or 1.0 / math.sqrt(config.kv_channels),
            causal=attn_mask_type in _CAUSAL,
            window=tuple(config.window_size) if windowed else None,
            cap=getattr(config, "attn_logit_softcapping", None),
        )
        self.backend = config.attention_backend.name
        self.cp_group: Any = None
        if config.context_parallel_size > 1:
            self.cp_group = getattr(pg_collection, "cp", None)
            if self.cp_group is None:
                self.cp_group = parallel_state.get_context_parallel_group()
        self.exchange = cp_comm_type or "all_gather"
        self._check(attention_type)

    def forward(  # noqa: PLR0917 - megatron-core's call
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Return the attention output ``[S, B, N * E]``.

        Args:
            query: ``[S, B, N, D]``; without B where samples are packed, if so wished.
            key: ``[T, B, G, D]``; N is a multiple of G.
            value: ``[T, B, G, E]``.
            attention_mask: Broadcasts to ``[B, N, S, T]``; True hides a key, on top of causality.
            attn_mask_type: In place of the one given at construction.
            attention_bias: Must be None.
            packed_seq_params: ``PackedSequences`` of samples that are not to see each other.

        Raises:
            EngineError: If an argument is given that must be None, or no kernel computes it.
        """
        if attention_bias is not None:
            raise EngineError(
                "the torch layer spec has no kernel for attention_bias; use model.layer_spec=te"
            )
        packed = _packed(packed_seq_params)
        if packed is not None:
            query, key, value = (x.unsqueeze(1) if x.dim() == 3 else x for x in (query, key, value))
        scoring = self.scoring
        if attn_mask_type is not None and scoring.causal != (attn_mask_type in _CAUSAL):
            scoring = evolve(scoring, causal=attn_mask_type in _CAUSAL)
        with self._random_state():
            if self.cp_group is None:
                out = self._attend(query, key, value, scoring, attention_mask, packed)
            elif attention_mask is not None or not scoring.causal:
                raise EngineError(
                    "context parallelism of the torch layer spec is for causal attention without"
                    " attention_mask; use model.context_parallel_size=1"
                )
            elif self.exchange == "p2p":
                out = self._attend_in_a_ring(query, key, value, packed)
            elif self.exchange == "a2a":
                out = self._attend_with_fewer_heads(query, key, value, packed)
            else:
                out = self._attend_to_gathered_keys(query, key, value, packed)
        return out.flatten(2)

    def _check(self, attention_type: str) -> None:
        config = self.config
        what = None
        if attention_type != "self":
            what = f"has self-attention only, not {attention_type!r}; use model.layer_spec=te"
        elif getattr(config, "softmax_type", "vanilla") != "vanilla":
            what = (
                f"computes the vanilla softmax only, not model.megatron.softmax_type="
                f"{config.softmax_type}; use model.layer_spec=te"
            )
        elif self.cp_group is not None and self.exchange not in _EXCHANGES:
            what = (
                f"exchanges keys and values by {', '.join(_EXCHANGES)}, not by model.cp_comm_type="
                f"{self.exchange}; use one of these, or model.layer_spec=te"
            )
        elif self.cp_group is not None and self.exchange == "p2p":
            if self.scoring.window is not None:
                what = f"has no ring for model.window_size={list(self.scoring.window)}"
            elif self.dropout > 0:
                what = f"has no ring for model.attention_dropout={self.dropout}"
            if what is not None:
                what += "; use model.cp_comm_type=all_gather"
        if what is not None:
            raise EngineError(f"the torch layer spec {what}")

    def _attend(  # noqa: PLR0917 - private
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        hidden: Tensor | None,
        packed: PackedSequences | None,
    ) -> Tensor:
        """Attend among rows that are all here."""
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"dropout": dropout, "backend": self.backend}
        if packed is None:
            return attend(query, key, value, scoring, hidden=hidden, **options)
        if hidden is not None:
            raise EngineError(
                "packed samples have no attention_mask; their boundaries say who sees whom"
            )
        whole = packed.segments(packed.chunks, packed.chunks)
        return attend_segments(query, key, value, scoring, whole, **options)

    def _attend_in_a_ring(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences | None
    ) -> Tensor:
        width = value.size(-1)
        # Keys and values travel in one message; zeros beside a narrower value change nothing.
        value = functional.pad(value, (0, key.size(-1) - width))
        out = ring_attention(
            query,
            key,
            value,
            scoring=self.scoring,
            kernel=block_kernel(query, self.scoring, self.backend),
            group=self.cp_group,
            packed=packed,
        )
        return out[..., :width]

    def _attend_with_fewer_heads(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences | None
    ) -> Tensor:
        ranks = self.cp_group.size()
        query, key, value = (
            exchange.in_order(exchange.heads_for_rows(x, self.cp_group), ranks, packed)
            for x in (query, key, value)
        )
        out = self._attend(query, key, value, self.scoring, None, packed)
        return exchange.rows_for_heads(exchange.in_parts(out, ranks, packed), self.cp_group)

    def _attend_to_gathered_keys(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences | None
    ) -> Tensor:
        """Let both chunks of each sequence attend to what precedes them."""
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        ends = rank + 1, 2 * ranks - rank
        # One collective for both; its backward pass reduces and scatters.
        rows = exchange.gather_rows(torch.cat([key, value], dim=-1), self.cp_group)
        widths = key.size(-1), value.size(-1)
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"dropout": dropout, "backend": self.backend}
        if packed is None:
            keys, values = exchange.in_order(rows, ranks, None).split_with_sizes(widths, dim=-1)
            chunk = query.size(0) // 2
            return torch.cat(
                [
                    attend(q, keys[: end * chunk], values[: end * chunk], self.scoring, **options)
                    for q, end in zip(query.chunk(2), ends, strict=True)
                ]
            )
        outputs = []
        for half, end in zip(packed.halves(), ends, strict=True):
            keys, values = rows.index_select(0, packed.prefix(end)).split_with_sizes(widths, dim=-1)
            segments = packed.segments(1, end)
            q = query.index_select(0, half)
            outputs.append(attend_segments(q, keys, values, self.scoring, segments, **options))
        return torch.cat(outputs).index_select(0, packed.from_halves())

    def _random_state(self) -> contextlib.AbstractContextManager[Any]:
        """Return the state of ranks that attend for other heads or tokens than others do."""
        if not self.training or self.dropout == 0.0:
            return _NOTHING
        if self.cp_group is not None:
            return get_cuda_rng_tracker().fork(CONTEXT_PARALLEL)  # type: ignore[no-any-return]
        # Under sequence parallelism the whole block is in this random state already.
        return _NOTHING if self.config.sequence_parallel else get_cuda_rng_tracker().fork()


def _packed(params: Any) -> PackedSequences | None:
    if params is None or isinstance(params, PackedSequences):
        return params
    raise EngineError(
        "the torch layer spec takes packed_seq_params from PackedSequences.of(read_packing(batch)),"
        f" not {type(params).__name__}"
    )
