# SPDX-License-Identifier: Apache-2.0
"""Attention on ``torch.nn.functional.scaled_dot_product_attention``, for any device.

It takes the place of megatron-core's ``DotProductAttention`` in a layer spec: the same softmax over
the same scores, without the ``[B, N, S, S]`` tensors, and with context parallelism.

Shape suffixes, all local to the rank: S = query tokens, T = key tokens, B = micro-batch,
N = query heads, G = key and value heads, D = width of a head, C = tokens of one chunk.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_KERNELS = {
    AttnBackend.flash: SDPBackend.FLASH_ATTENTION,
    AttnBackend.fused: SDPBackend.EFFICIENT_ATTENTION,
    AttnBackend.unfused: SDPBackend.MATH,
    AttnBackend.local: SDPBackend.MATH,
}
_NOTHING = contextlib.nullcontext()


class TorchAttention(MegatronModule):  # type: ignore[misc]
    """Softmax attention of this rank's heads; grouped queries, sliding window, dropout, CP.

    Under tensor parallelism a rank has N of all heads and draws dropout from the tracker's
    model-parallel state, so that ranks drop different entries. Under context parallelism it has the
    two chunks of the zig-zag order (:func:`mb_engine.parallel.sequence.context_parallel_slice`):
    keys and values are gathered over the group, and each chunk attends to the keys up to its own
    end, which is the same work on every rank.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped queries: Ainslie et al. 2023,
    arXiv:2305.13245; gathered context parallelism: Llama 3, arXiv:2407.21783, section 3.3.2.
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
        if attention_type != "self":
            raise EngineError(
                f"the torch layer spec has self-attention only, not {attention_type!r};"
                " use model.layer_spec=te"
            )
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise EngineError(
                f"model.megatron.softmax_type={config.softmax_type}: the torch layer spec computes"
                " the vanilla softmax only; use model.layer_spec=te"
            )
        if cp_comm_type not in (None, "all_gather") and config.context_parallel_size > 1:
            raise EngineError(
                f"model.cp_comm_type={cp_comm_type}: the torch layer spec exchanges keys and values"
                " by all_gather; leave it out, or use model.layer_spec=te"
            )
        self.causal = attn_mask_type in _CAUSAL
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = tuple(config.window_size) if windowed else None
        self.kernel = _KERNELS.get(config.attention_backend)
        self.cp_group: Any = None
        if config.context_parallel_size > 1:
            self.cp_group = getattr(pg_collection, "cp", None)
            if self.cp_group is None:
                self.cp_group = parallel_state.get_context_parallel_group()

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
        """Return the attention output ``[S, B, N * D]``.

        Args:
            query: ``[S, B, N, D]``.
            key: ``[T, B, G, D]``; N is a multiple of G.
            value: ``[T, B, G, D]``.
            attention_mask: Broadcasts to ``[B, N, S, T]``; True hides a key, on top of causality.
            attn_mask_type: In place of the one given at construction.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Raises:
            EngineError: If sequences are packed, or an argument is given that must be None.
        """
        if packed_seq_params is not None or attention_bias is not None:
            what = "attention_bias" if packed_seq_params is None else "packed_seq_params"
            raise EngineError(
                f"the torch layer spec has no kernel for {what}; use model.layer_spec=te, or one"
                " sequence a row"
            )
        causal = self.causal if attn_mask_type is None else attn_mask_type in _CAUSAL
        if self.cp_group is None:
            return self._attend(query, key, value, attention_mask, causal=causal)
        if attention_mask is not None or not causal:
            raise EngineError(
                "context parallelism of the torch layer spec is for causal attention without"
                " attention_mask; use model.context_parallel_size=1"
            )
        return self._attend_over_ranks(query, key, value)

    def _attend_over_ranks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Gather keys and values, and let both chunks of this rank attend to what precedes them."""
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        chunk = query.size(0) // 2
        width = key.size(-1)
        # One collective for both; its backward pass reduces and scatters.
        mine_TBG2D = torch.cat([key, value], dim=-1)
        all_TBG2D = gather_from_sequence_parallel_region(mine_TBG2D, group=self.cp_group)
        halves = all_TBG2D.view(ranks, 2, chunk, *all_TBG2D.shape[1:])
        in_order = torch.cat([halves[:, 0], halves[:, 1].flip(0)]).flatten(0, 1)
        key, value = in_order[..., :width], in_order[..., width:]
        parts = ((query[:chunk], rank), (query[chunk:], 2 * ranks - 1 - rank))
        outputs = []
        for q_CBND, index in parts:
            end = (index + 1) * chunk
            outputs.append(self._attend(q_CBND, key[:end], value[:end], None, causal=True))
        return torch.cat(outputs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, *, causal: bool
    ) -> Tensor:
        queries, keys = query.size(0), key.size(0)
        mask: Tensor | None = None
        if self.window is not None or (causal and queries != keys) or hidden is not None:
            mask = visible_keys(
                queries, keys, causal=causal, window=self.window, device=query.device
            )
            if hidden is not None:
                mask = mask & ~hidden
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout), self._chosen_kernel():
            out_BNSD = functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=self.scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return out_BNSD.permute(2, 0, 1, 3).reshape(queries, query.size(1), -1)

    def _random_state(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        # Under sequence parallelism the whole block is in this random state already.
        if dropout > 0.0 and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()  # type: ignore[no-any-return]
        return _NOTHING

    def _chosen_kernel(self) -> contextlib.AbstractContextManager[Any]:
        return _NOTHING if self.kernel is None else sdpa_kernel(self.kernel)


@functools.lru_cache(maxsize=16)
def visible_keys(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    device: torch.device,
) -> Tensor:
    """Return which key each query sees, bool ``[S, T]``; True where it does.

    Queries are the last ones of the keys, as in a sequence whose earlier part is known.

    Args:
        queries: S.
        keys: T, at least S.
        causal: Hide later keys.
        window: Tokens seen to the left and to the right; -1 for all.
        device: Of the result.
    """
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = torch.arange(keys, device=device)[None, :] - position
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    left, right = window or (-1, -1)
    if left >= 0:
        visible &= distance >= -left
    if causal or right >= 0:
        visible &= distance <= (0 if causal else right)
    return visible
