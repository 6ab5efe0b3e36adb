# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's self-attention on a short way for training, and on its own for all else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from mb_engine.model.attention.packed import PackedSequences
from mb_engine.model.rotary import rotary_table, split_and_rotate
from mb_engine.model.rotary_scaling import local_rotary_of

if TYPE_CHECKING:
    from torch import Tensor


class TorchSelfAttention(SelfAttention):  # type: ignore[misc]
    """Projection to queries, keys and values, rotary positions, core attention, projection back.

    Same modules, parameters and result as ``SelfAttention``. Its forward pass serves inference,
    offloading and more, and computes the rotary table anew in
    every layer; the usual training step needs none of that.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``SelfAttention``."""
        super().__init__(*args, **kwargs)
        config = self.config
        self.local_rotary = local_rotary_of(config, self.layer_number)
        self.is_usual = (
            config.num_query_groups >= self.world_size
            and isinstance(self.q_layernorm, (IdentityOp, type(None)))
            and isinstance(self.k_layernorm, (IdentityOp, type(None)))
            and not any(getattr(config, name, None) for name in _UNUSUAL)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output ``[S, B, H]`` and the bias that the caller is to add, or None.

        Args:
            hidden_states: ``[S, B, H]``; ``[S/tp, B, H]`` under sequence parallelism.
            attention_mask: Given to the core attention.
            *args: As ``SelfAttention`` takes them.
            rotary_pos_emb: Angles ``[S, 1, 1, D]``, or None; of the positions in a sample where
                samples are packed.
            packed_seq_params: How the row is packed, or None.
            **kwargs: As ``SelfAttention`` takes them.
        """
        width = self.hidden_size_per_attention_head
        if self.local_rotary is not None and rotary_pos_emb is not None:
            rotary_pos_emb = self.local_rotary.angles(rotary_pos_emb)
        if (
            not self.is_usual
            or args
            or any(value is not None for value in kwargs.values())
            or rotary_pos_emb is None
            or isinstance(rotary_pos_emb, tuple)
            or not _is_ours(packed_seq_params)
            or rotary_pos_emb.size(-1) != width
        ):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        mixed, _ = self.linear_qkv(hidden_states)
        if packed_seq_params is None:
            cos, sin = rotary_table(rotary_pos_emb, mixed.dtype)
        else:
            cos, sin = packed_seq_params.rotary_table(rotary_pos_emb, mixed.dtype)
        query, key, value = split_and_rotate(
            mixed, cos, sin, groups=self.num_query_groups_per_partition, width=width
        )
        recomputed = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if recomputed else self.core_attention
        context = attend(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params,
        )
        output, bias = self.linear_proj(context)
        return output, bias


def _is_ours(packed: Any) -> bool:
    return packed is None or isinstance(packed, PackedSequences)


_UNUSUAL = (
    "apply_rope_fusion",
    "attention_output_gate",
    "cpu_offloading",
    "fine_grained_activation_offloading",
    "flash_decode",
    "fused_single_qkv_rope",
    "mrope_section",
    "multi_latent_attention",
    "no_rope_freq",
    "rotary_interleaved",
    "test_mode",
    "yarn_rotary_scaling_factor",
)
"""Fields of ``TransformerConfig`` that send attention through megatron-core's own forward pass."""
