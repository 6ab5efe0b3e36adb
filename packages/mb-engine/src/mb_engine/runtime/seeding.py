# SPDX-License-Identifier: Apache-2.0
"""Random numbers: one seed for a job, and the states that a checkpoint keeps.

A rank draws from python, numpy, torch's CPU and CUDA generators, and from the named states of
megatron-core's tracker: what is replicated over tensor-parallel ranks draws the same numbers on
them, what is split draws different ones.
"""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config import RNGConfig
    from mb_config.records import ProcessLayout
    from torch import Tensor

_TRACKER = "megatron."
_STAGE_STRIDE = 100
_REPLICA_STRIDE = 10
_NUMPY_SEEDS = 2**32
CONTEXT_PARALLEL = "context-parallel-rng"
"""Name of the tracker's state that differs on context- and tensor-parallel ranks."""
_CONTEXT_OFFSET, _CONTEXT_STRIDE = 500_009, 1_009


def rank_seed(config: RNGConfig, layout: ProcessLayout) -> int:
    """Return the seed of this rank: 100 apart a pipeline stage, and if asked 10 a replica."""
    seed = config.seed + _STAGE_STRIDE * layout.pp_rank
    if config.data_parallel_random_init:
        seed += _REPLICA_STRIDE * layout.dp_rank
    return seed


def seed_everything(config: RNGConfig, layout: ProcessLayout) -> None:
    """Seed every generator of this rank; megatron-core's tracker starts anew.

    Tensor-parallel ranks share the default state and differ in ``model-parallel-rng``; ranks that
    hold different experts differ in ``expert-parallel-rng``, and those that attend for different
    tokens in ``context-parallel-rng``, which is there under context parallelism.

    Args:
        config: The ``rng`` section.
        layout: This rank's place.
    """
    from megatron.core.tensor_parallel.random import (
        get_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
    )

    seed = rank_seed(config, layout)
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)  # noqa: NPY002 - the global generator is what libraries use
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, te_rng_tracker=config.te_rng_tracker, force_reset_rng=True
    )
    if layout.cp > 1:
        place = _CONTEXT_STRIDE * layout.cp_rank + layout.tp_rank
        get_cuda_rng_tracker().add(CONTEXT_PARALLEL, seed + _CONTEXT_OFFSET + place)


def rng_state() -> dict[str, Tensor]:
    """Return copies of all random states of this rank, as integer tensors on the CPU.

    Keys are ``python``, ``numpy``, ``torch``, ``cuda`` (on CUDA) and ``megatron.<name>`` for each
    state of megatron-core's tracker.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = {"python": _python_state(), "numpy": _numpy_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        tensor = state.get_state() if isinstance(state, torch.Generator) else state
        states[_TRACKER + name] = tensor.clone()
    return states


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Take over the random states that :func:`rng_state` returned.

    Args:
        states: From a rank at the same place of the same layout.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    _set_python_state(states["python"])
    _set_numpy_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    tracked: dict[str, Any] = tracker.get_states()
    for key, tensor in states.items():
        if not key.startswith(_TRACKER):
            continue
        name = key.removeprefix(_TRACKER)
        if isinstance(tracked.get(name), torch.Generator):
            tracked[name].set_state(tensor)  # a CUDA graph holds on to this very generator
        else:
            tracked[name] = tensor.clone()
    tracker.set_states(tracked)


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _python_state() -> Tensor:
    """Return 627 integers: 625 of the twister, whether a Gaussian is left over, and its bits."""
    _, words, gauss = random.getstate()
    left_over = [0, 0] if gauss is None else [1, _bits(gauss)]
    return torch.tensor([*words, *left_over], dtype=torch.int64)


def _set_python_state(state: Tensor) -> None:
    *words, has_gauss, bits = state.tolist()
    random.setstate((3, tuple(words), _float(bits) if has_gauss else None))


def _numpy_state() -> Tensor:
    """Return 627 integers: 624 of the twister, position, whether a Gaussian is left, its bits."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    inner = state["state"]
    words = [*inner["key"].tolist(), inner["pos"], state["has_gauss"], _bits(state["gauss"])]
    return torch.tensor(words, dtype=torch.int64)


def _set_numpy_state(state: Tensor) -> None:
    *words, position, has_gauss, bits = state.tolist()
    key = np.array(words, dtype=np.uint32)
    np.random.set_state(  # noqa: NPY002
        ("MT19937", key, position, has_gauss, _float(bits))
    )
