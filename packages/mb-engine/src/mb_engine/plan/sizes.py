# SPDX-License-Identifier: Apache-2.0
"""Sizes of the tensors of one micro-batch on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from mb_engine.plan.memory import parameter_bytes

if TYPE_CHECKING:
    from mb_config import ConfigContainer
    from mb_config.sections.model import ModelConfig

    from mb_engine.plan.layout import Degrees


@frozen(kw_only=True)
class Sizes:
    """What the formulas for activations and communication are written in.

    Attributes:
        tokens: Tokens of a micro-batch on a context-parallel rank.
        spread_tokens: The same where sequence parallelism splits them.
        length: Tokens of one sequence on a context-parallel rank.
        hidden: Bytes of the residual stream of all *tokens*.
        spread_hidden: Bytes of the residual stream as sequence parallelism splits it.
        query: Bytes of this rank's queries of all *tokens*.
        key: Bytes of this rank's keys.
        value: Bytes of this rank's values.
        attended: Bytes of what attention returns on this rank.
        routed_tokens: Rows that this rank's experts get, with evenly chosen experts.
        element: Bytes of an activation element.
    """

    tokens: int
    spread_tokens: int
    length: int
    hidden: int
    spread_hidden: int
    query: int
    key: int
    value: int
    attended: int
    routed_tokens: int
    element: int

    @classmethod
    def from_config(cls, config: ConfigContainer, degrees: Degrees) -> Sizes:
        """Return the sizes for a resolved configuration."""
        model, element = config.model, parameter_bytes(config)
        length = model.seq_length // degrees.cp
        tokens = length * config.train.micro_batch_size
        spread = tokens // degrees.tp if model.sequence_parallel else tokens
        head = value = (model.kv_channels or 0) * element
        heads = model.num_attention_heads // degrees.tp
        groups = max(1, (model.num_query_groups or 0) // degrees.tp)
        if model.multi_latent_attention:
            head = (model.qk_head_dim + model.qk_pos_emb_head_dim) * element
            value, groups = model.v_head_dim * element, heads
        return cls(
            tokens=tokens,
            spread_tokens=spread,
            length=length,
            hidden=tokens * model.hidden_size * element,
            spread_hidden=spread * model.hidden_size * element,
            query=tokens * heads * head,
            key=tokens * groups * head,
            value=tokens * groups * value,
            attended=tokens * heads * value,
            routed_tokens=_routed_tokens(model, spread * degrees.etp),
            element=element,
        )


def _routed_tokens(model: ModelConfig, tokens: int) -> int:
    """Return the rows of all experts of a rank together, where they are chosen evenly.

    What is over an expert's capacity is dropped; with padding each expert gets its capacity.
    """
    routed = tokens * model.moe_router_topk
    capacity = model.moe_expert_capacity_factor
    if capacity is None or capacity < 0:
        return routed
    return int(routed * (capacity if model.moe_pad_expert_input_to_capacity else min(1, capacity)))
