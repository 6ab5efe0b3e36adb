# SPDX-License-Identifier: Apache-2.0
"""Sliding windows as ``config.json`` has them.

There a window counts the token itself; ours counts the tokens before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mb_engine.bridge.errors import MappingError
from mb_engine.bridge.family import Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config import ModelConfig

_SLIDING, _FULL = "sliding_attention", "full_attention"


def in_every_layer() -> Part:
    """Return the part of a window in all layers, or none."""

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        window = config.get("sliding_window")
        size = None if window is None else (window - 1, 0)
        return {"window_size": size, "window_attn_skip_freq": None}

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.window_attn_skip_freq is not None:
            raise MappingError("model.window_attn_skip_freq: the family has a window in all layers")
        return {"sliding_window": _written(model)}

    return Part(read, write)


def above_a_layer() -> Part:
    """Return the part of Qwen: a window in the layers from ``max_window_layers`` on, if at all."""

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        kinds = config.get("layer_types")
        if not config.get("use_sliding_window", False):
            if kinds and _SLIDING in kinds:
                raise MappingError(
                    "config.json: layer_types has sliding layers but use_sliding_window is false"
                )
            return {"window_size": None, "window_attn_skip_freq": None}
        first = config.get("max_window_layers", 28)
        kinds = kinds or [
            _SLIDING if layer >= first else _FULL for layer in range(config["num_hidden_layers"])
        ]
        return _windows(config.get("sliding_window", 4096), kinds)

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.window_size is None:
            return {"use_sliding_window": False, "sliding_window": None}
        kinds = layer_types(model)
        return {
            "use_sliding_window": True,
            "sliding_window": _written(model),
            "layer_types": kinds,
            "max_window_layers": kinds.index(_SLIDING) if _SLIDING in kinds else len(kinds),
        }

    return Part(read, write)


def alternating(*, every: int, window: int) -> Part:
    """Return the part of Gemma: windows but in every n-th layer.

    Args:
        every: n where ``config.json`` does not say.
        window: Its size where it does not say.
    """

    def read(config: Mapping[str, Any]) -> dict[str, Any]:
        layers = config["num_hidden_layers"]
        n = config.get("sliding_window_pattern") or every
        kinds = config.get("layer_types") or [
            _SLIDING if (layer + 1) % n else _FULL for layer in range(layers)
        ]
        return _windows(config.get("sliding_window", window), kinds)

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.window_size is None:
            raise MappingError("model.window_size=None: the family has windows")
        return {"sliding_window": _written(model), "layer_types": layer_types(model)}

    return Part(read, write)


def layer_types(model: ModelConfig) -> list[str]:
    """Return for each layer whether it has the window, in the words of ``config.json``."""
    every = model.window_attn_skip_freq
    if isinstance(every, list):
        return [_SLIDING if one else _FULL for one in every]
    numbers = range(1, model.num_layers + 1)
    return [_SLIDING if every is None or number % every else _FULL for number in numbers]


def _windows(window: int, kinds: list[str]) -> dict[str, Any]:
    if set(kinds) - {_SLIDING, _FULL}:
        raise MappingError(
            f"config.json: layer_types has {sorted(set(kinds))}; known are {_SLIDING} and {_FULL}"
        )
    if _SLIDING not in kinds:
        return {"window_size": None, "window_attn_skip_freq": None}
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": [int(kind == _SLIDING) for kind in kinds],
    }


def _written(model: ModelConfig) -> int | None:
    if model.window_size is None:
        return None
    left, right = model.window_size
    if right not in {0, -1}:
        raise MappingError(f"model.window_size={model.window_size}: it looks ahead, theirs do not")
    return left + 1
