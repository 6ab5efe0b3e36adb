# SPDX-License-Identifier: Apache-2.0
"""The engine with some of its short ways switched off, so that megatron-core's own are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.nn import functional

from contenders.engine import EngineLoop
from contenders.shape import Shape, Weights


def _switch(class_name: str, flag: str) -> Callable[[Any], None]:
    def switch_off(module: Any) -> None:
        if type(module).__name__ == class_name:
            setattr(module, flag, False)

    return switch_off


def _own_loss(module: Any) -> None:
    from megatron.core.models.gpt import GPTModel

    if isinstance(module, GPTModel):
        loss = GPTModel.compute_language_model_loss
        module.compute_language_model_loss = loss.__get__(module)


def _torch_norm(module: Any) -> None:
    if type(module).__name__ == "RMSNorm":
        shape, weight, eps = module.shape, module.weight, module.eps
        module.forward = lambda x: functional.rms_norm(x, shape, weight, eps)


SWITCHES: dict[str, list[Callable[[Any], None]]] = {
    "layer": [_switch("TorchTransformerLayer", "is_usual")],
    "self-attention, rotary positions": [_switch("TorchSelfAttention", "is_usual")],
    "linears": [_switch("ColumnLinear", "is_whole"), _switch("RowLinear", "is_whole")],
    "MLP": [_switch("TorchMLP", "is_usual")],
    "RMSNorm": [_torch_norm],
    "cross-entropy": [_own_loss],
}
"""Short ways of the model, each with what switches it off in a module."""

PARTS = {
    "gradients in their buffer": {
        "mb_engine.parallel.gradient_buffer.BufferedDataParallel": "DistributedDataParallel",
        "mb_engine.parallel.wrap._is_data_parallel": lambda _config: False,
    },
    "clipping of the buffer": {
        "mb_engine.train.clipping.use_buffers": lambda optimizer, _chunks: optimizer
    },
    "fused AdamW": {"mb_engine.train.optimizer._fuse_on_cpu": lambda _optimizer: None},
}
"""Short ways outside of it, each with what stands for its parts while an engine is built."""


class Variant(EngineLoop):
    """An engine beside others of this process, with the ways *without* left to megatron-core."""

    def __init__(self, name: str, shape: Shape, weights: Weights, without: list[str]) -> None:
        self.name = name
        with _replaced(without):
            super().__init__(shape, weights)
        for way in without:
            for switch_off in SWITCHES.get(way, []):
                for model in self.engine.model:
                    model.apply(switch_off)

    def close(self) -> None:
        """Leave the process groups to the engine that made them."""


def all_variants(shape: Shape, weights: Weights) -> list[EngineLoop]:
    """Return the engine, the engine without each short way, and that without any of them."""
    whole = EngineLoop(shape, weights)
    ways = [*SWITCHES, *PARTS]
    without_one = [Variant(f"without: {way}", shape, weights, [way]) for way in ways]
    return [whole, *without_one, Variant("megatron-core's own throughout", shape, weights, ways)]


@contextmanager
def _replaced(without: list[str]) -> Iterator[None]:
    """Build an engine inside this without some parts, and with the process groups there are."""
    from megatron.core.distributed import DistributedDataParallel

    def nothing(*_arguments: Any, **_named: Any) -> None: ...

    groups = "mb_engine.runtime.distributed"
    parts: dict[str, Any] = {f"{groups}._connect": nothing, f"{groups}._make_groups": nothing}
    for way in without:
        parts |= PARTS.get(way, {})
    patches = [
        mock.patch(target, DistributedDataParallel if part == "DistributedDataParallel" else part)
        for target, part in parts.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
