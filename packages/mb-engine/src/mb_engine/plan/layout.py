# SPDX-License-Identifier: Apache-2.0
"""Where each rank stands and which layers it holds, in megatron-core's order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from mb_config import ConfigContainer
    from mb_config.sections.model import ModelConfig


@frozen(kw_only=True)
class Degrees:
    """How many ways each kind of parallelism splits the job.

    Attributes:
        tp, cp, dp, pp, vpp, ep, etp, edp: Tensor, context, data, pipeline, virtual pipeline, expert,
            expert-tensor and expert-data parallelism; ``vpp`` is 1 without interleaving.
        pipeline_before_data: Ranks count up through pipeline stages before replicas.
    """

    tp: int
    cp: int
    dp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    edp: int
    pipeline_before_data: bool = False

    @classmethod
    def from_config(cls, config: ConfigContainer) -> Degrees:
        """Return the degrees of a resolved configuration."""
        model = config.model
        tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
        cp, dp = model.context_parallel_size, config.train.data_parallel_size or 1
        ep = model.expert_model_parallel_size
        etp = model.expert_tensor_parallel_size or tp
        return cls(
            tp=tp,
            cp=cp,
            dp=dp,
            pp=pp,
            vpp=model.virtual_pipeline_model_parallel_size or 1,
            ep=ep,
            etp=etp,
            edp=tp * cp * dp // (ep * etp),
            pipeline_before_data=config.dist.use_tp_pp_dp_mapping,
        )

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.tp * self.cp * self.dp * self.pp

    def place(self, rank: int) -> Place:
        """Return the coordinates of *rank*.

        Source: megatron-core 0.16.1, ``parallel_state.RankGenerator`` with the orders
        ``tp-cp-ep-dp-pp`` and ``tp-cp-ep-pp-dp``; experts have an order of their own without cp.
        """
        inner, rest = rank % (self.tp * self.cp), rank // (self.tp * self.cp)
        expert_inner, expert_rest = rank % (self.etp * self.ep), rank // (self.etp * self.ep)
        if self.pipeline_before_data:
            pp_rank, dp_rank = rest % self.pp, rest // self.pp
            edp_rank = expert_rest // self.pp
        else:
            pp_rank, dp_rank = rest // self.dp, rest % self.dp
            edp_rank = expert_rest % self.edp
        cp_rank = inner // self.tp
        return Place(
            tp_rank=inner % self.tp,
            cp_rank=cp_rank,
            dp_rank=dp_rank,
            pp_rank=pp_rank,
            ep_rank=expert_inner // self.etp,
            replica=cp_rank + self.cp * dp_rank,
            expert_replica=edp_rank,
        )


@frozen(kw_only=True)
class Place:
    """The coordinates of one rank.

    Attributes:
        tp_rank, cp_rank, dp_rank, pp_rank, ep_rank: Coordinates.
        replica: Place among the ranks with the same dense parameters (data x context parallel).
        expert_replica: Place among the ranks with the same experts.
    """

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    ep_rank: int
    replica: int
    expert_replica: int


def expert_layers(model: ModelConfig) -> list[bool]:
    """Return for each layer whether it has experts."""
    if not model.num_moe_experts:
        return [False] * model.num_layers
    if isinstance(model.moe_layer_freq, list):
        return [bool(flag) for flag in model.moe_layer_freq]
    return [i % model.moe_layer_freq == 0 for i in range(model.num_layers)]


def windowed_layers(model: ModelConfig) -> list[bool]:
    """Return for each layer whether its attention has the sliding window.

    Source: megatron-core 0.16.1, ``is_layer_window_attention``.
    """
    frequency = model.window_attn_skip_freq
    if model.window_size is None:
        return [False] * model.num_layers
    if frequency is None:
        return [True] * model.num_layers
    if isinstance(frequency, list):
        return [bool(flag) for flag in frequency]
    return [(i + 1) % frequency != 0 for i in range(model.num_layers)]


def exchange(model: ModelConfig) -> str:
    """Return how context-parallel ranks exchange keys and values, in the first layer if they differ.

    Where it is open, what ``finalize`` chooses.
    """
    kind = model.cp_comm_type
    first = kind[0] if isinstance(kind, list) else kind
    bound = model.window_size is not None or model.attention_dropout > 0
    return first or ("all_gather" if bound else "p2p")


def ring_share(ranks: int) -> float:
    """Return the part of a tensor that a rank sends in a ring all-gather or reduce-scatter."""
    return (ranks - 1) / ranks


def lcm_up(value: int, multiple: int) -> int:
    """Return *value* rounded up to a multiple."""
    return math.ceil(value / multiple) * multiple
