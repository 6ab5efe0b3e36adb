# SPDX-License-Identifier: Apache-2.0
"""Stateless random numbers: 64-bit hashes of counters, the same on every machine and version.

``numpy.random.Generator`` may change its streams between releases (NEP 19); an order that a
checkpoint counts into must not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a bijective hash of each 64-bit value.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
    """
    z = values ^ (values >> np.uint64(30))
    z = z * np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def key(*parts: int) -> int:
    """Return one 64-bit key for a tuple of integers, such as ``(seed, epoch, purpose)``."""
    state = 0
    for part in parts:
        counter = np.array([(state + (part & _MASK) + _GAMMA) & _MASK], dtype=np.uint64)
        state = int(mix(counter)[0])
    return state


def hash_index(index: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Return 64 random bits for each of *index* (any shape) under *seed*."""
    counters = index.astype(np.uint64) * np.uint64(_GAMMA)
    return mix(counters + np.uint64(key(seed)))
