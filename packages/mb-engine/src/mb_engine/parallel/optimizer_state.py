# SPDX-License-Identifier: Apache-2.0
"""The live state tensors of megatron-core's optimizers, parameter by parameter.

Reads what these classes of ``megatron.core.optimizer`` hold: ``FP32Optimizer``,
``Float16OptimizerWithFloat16Params``, ``DistributedOptimizer`` and a ``ChainedOptimizer`` of them.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

MAIN_PARAM = "main_param"


@frozen(kw_only=True, eq=False)
class ParameterState:
    """What an optimizer keeps for one parameter on this rank.

    Attributes:
        param: The model's parameter.
        tensors: State by name, such as ``exp_avg``; same shape as *param*, or one-dimensional
            over ``flat_range``.
        flat_range: Elements of the flattened parameter that this rank owns, None for all.
    """

    param: Tensor
    tensors: Mapping[str, Tensor]
    flat_range: tuple[int, int] | None = None


def parameter_states(optimizer: Any) -> Iterator[ParameterState]:
    """Yield the state of every parameter that *optimizer* trains on this rank."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(one, "is_stub_optimizer", False):
            continue
        if hasattr(one, "model_param_group_index_map"):
            yield from _distributed(one)
        elif hasattr(one, "fp32_from_float16_groups"):
            yield from _with_main_params(one)
        else:
            for group in one.optimizer.param_groups:
                for param in group["params"]:
                    yield ParameterState(param=param, tensors=_moments(one.optimizer.state[param]))


def _moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and k != "step"}


def _with_main_params(one: Any) -> Iterator[ParameterState]:
    inner = one.optimizer
    pairs = zip(
        chain.from_iterable(one.float16_groups),
        chain.from_iterable(one.fp32_from_float16_groups),
        strict=True,
    )
    for param, main in pairs:
        yield ParameterState(param=param, tensors={MAIN_PARAM: main, **_moments(inner.state[main])})
    for param in chain.from_iterable(one.fp32_from_fp32_groups):
        yield ParameterState(param=param, tensors=_moments(inner.state[param]))


def _distributed(one: Any) -> Iterator[ParameterState]:
    for param in one.model_param_group_index_map:
        owned = one._get_model_param_range_map(param)["param"]  # noqa: SLF001
        tensors = _moments(one._get_main_param_and_optimizer_states(param))  # noqa: SLF001
        main = tensors.pop("param")
        if param.dtype != torch.float32:
            tensors[MAIN_PARAM] = main
        yield ParameterState(param=param, tensors=tensors, flat_range=(owned.start, owned.end))


def allocate_state(optimizer: Any) -> None:
    """Create the state that the first step would create, zero-filled, where there is none yet.

    A load writes into it. Megatron-core's own initialisers leave out what torch's optimizers add:
    Adam's ``step`` and the momentum buffer of SGD.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(one, "is_stub_optimizer", False):
            continue
        inner = one.optimizer
        if one.init_state_fn is not None:
            one.init_state_fn(inner, one.config)
        for group in inner.param_groups:
            for param in group["params"]:
                state = inner.state[param]
                if isinstance(inner, (torch.optim.AdamW, torch.optim.Adam)):
                    state.setdefault("step", torch.tensor(0.0))
                elif group.get("momentum"):
                    state.setdefault("momentum_buffer", torch.zeros_like(param.detach()))


def optimizer_steps(optimizer: Any) -> set[int]:
    """Return the update counts found: torch keeps one a parameter, Transformer Engine one a group."""
    steps: set[int] = set()
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(one, "is_stub_optimizer", False):
            continue
        for group in one.optimizer.param_groups:
            if "step" in group:
                steps.add(int(group["step"]))
            for param in group["params"]:
                if "step" in one.optimizer.state.get(param, {}):
                    steps.add(int(one.optimizer.state[param]["step"]))
                    break
    return steps


def set_optimizer_steps(optimizer: Any, step: int) -> None:
    """Write *step* to wherever :func:`optimizer_steps` looks."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(one, "is_stub_optimizer", False):
            continue
        torch_adam = isinstance(one.optimizer, (torch.optim.AdamW, torch.optim.Adam))
        for group in one.optimizer.param_groups:
            if not torch_adam and "betas" in group:
                group["step"] = step
            for param in group["params"]:
                state = one.optimizer.state.get(param)
                if state is not None and "step" in state:
                    state["step"].fill_(step)
