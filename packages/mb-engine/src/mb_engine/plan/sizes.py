# SPDX-License-Identifier: Apache-2.0
"""Sizes of the tensors of one micro-batch on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from mb_engine.plan.memory import parameter_bytes

if TYPE_CHECKING:
    from mb_config import ConfigContainer

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
        key: Bytes of this rank's keys, which is that of its values.
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
    routed_tokens: int
    element: int

    @classmethod
    def from_config(cls, config: ConfigContainer, degrees: Degrees) -> Sizes:
        """Return the sizes for a resolved configuration."""
        model, element = config.model, parameter_bytes(config)
        length = model.seq_length // degrees.cp
        tokens = length * config.train.micro_batch_size
        spread = tokens // degrees.tp if model.sequence_parallel else tokens
        head = (model.kv_channels or 0) * element
        groups = max(1, (model.num_query_groups or 0) // degrees.tp)
        return cls(
            tokens=tokens,
            spread_tokens=spread,
            length=length,
            hidden=tokens * model.hidden_size * element,
            spread_hidden=spread * model.hidden_size * element,
            query=tokens * model.num_attention_heads // degrees.tp * head,
            key=tokens * groups * head,
            routed_tokens=spread * model.moe_router_topk * degrees.etp,
            element=element,
        )
