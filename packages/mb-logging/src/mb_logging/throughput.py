# SPDX-License-Identifier: Apache-2.0
"""Tokens per second, model FLOP/s and their share of a device's peak."""

from __future__ import annotations

from collections import deque

# Dense bf16 peak of one device in TFLOP/s, without sparsity. Source: NVIDIA's data sheets.
PEAK_BF16_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}


def peak_tflops(device: str) -> float | None:
    """Return the dense bf16 peak of *device* (a name as CUDA gives it), None if unknown."""
    names = sorted(PEAK_BF16_TFLOPS, key=len, reverse=True)
    return next((PEAK_BF16_TFLOPS[n] for n in names if n in device), None)


def model_flops_utilization(tflops_per_device: float, device: str) -> float | None:
    """Return model FLOP/s as a share of the device's dense bf16 peak, None if that is unknown.

    Source: Chowdhery et al. 2022 (PaLM), appendix B; recomputation does not count as work.
    """
    peak = peak_tflops(device)
    return None if peak is None else tflops_per_device / peak


class ThroughputWindow:
    """Tokens per second over the last steps.

    Args:
        size: Steps that count.
    """

    def __init__(self, size: int = 100) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=size + 1)
        self._tokens = 0

    def add(self, tokens: int, *, now: float) -> None:
        """Count *tokens* processed up to *now*, in seconds of any clock."""
        self._tokens += tokens
        self._marks.append((now, self._tokens))

    def tokens_per_second(self) -> float | None:
        """Return the rate between the oldest and the newest mark, None before there are two."""
        if len(self._marks) < 2:
            return None
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return (after - before) / (last - first) if last > first else None
