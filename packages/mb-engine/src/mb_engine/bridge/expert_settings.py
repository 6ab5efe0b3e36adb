# SPDX-License-Identifier: Apache-2.0
"""How ``config.json`` speaks of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mb_engine.bridge.family import Part
from mb_engine.bridge.mapping import expert_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config import ModelConfig


def routing(*, normalized: bool) -> Part:
    """Return the part of whether the weights of the chosen experts add up to 1.

    They do where the softmax is taken over the chosen ones alone.

    Args:
        normalized: Where ``config.json`` does not say.
    """
    return Part(
        lambda config: {"moe_router_pre_softmax": not config.get("norm_topk_prob", normalized)},
        lambda model: {"norm_topk_prob": not model.moe_router_pre_softmax},
    )


def which_layers() -> Part:
    """Return the part of the layers that have experts, as Qwen says it."""

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        dense = set(config.get("mlp_only_layers") or ())
        step = config.get("decoder_sparse_step", 1)
        layers = range(config["num_hidden_layers"])
        chosen = [int(i not in dense and (i + 1) % step == 0) for i in layers]
        return {"moe_layer_freq": 1 if all(chosen) else chosen}

    def write(model: ModelConfig) -> dict[str, Any]:
        dense = [i for i, has_experts in enumerate(expert_layers(model)) if not has_experts]
        return {"mlp_only_layers": dense, "decoder_sparse_step": 1}

    return Part(read, write)
