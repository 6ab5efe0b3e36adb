# SPDX-License-Identifier: Apache-2.0
"""Tokens per second, model FLOP/s, and their share of a device's peak.

With ``t`` tokens done in ``s`` seconds by ``n`` devices, and ``f`` FLOPs that the model needs for
forward and backward of one token::

    tokens/s        = t / s
    TFLOP/s/device  = t / s * f / n / 1e12
    MFU             = TFLOP/s/device / peak TFLOP/s of the device

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B. Recomputed activations are work
of the device but not of the model, so they do not count in ``f``.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Literal

from attrs import frozen

Precision = Literal["bf16", "fp8"]

# Dense TFLOP/s of one device as (bf16, fp8), without structured sparsity: where a data sheet gives
# the sparse number alone, half of it. A name applies to devices that have all of its words.
# Source: NVIDIA's data sheets of the V100 (fp16), A10, A30, A40, A100, L4, L40, L40S, H100, H200,
# H20, GH200, HGX B200, HGX B300, GB200 NVL72 and GB300 NVL72; the Ada and Ampere (GA102)
# whitepapers, with fp32 accumulation, for GeForce.
PEAK_TFLOPS: dict[str, tuple[float, float | None]] = {
    "V100": (125.0, None),
    "A10": (125.0, None),
    "A30": (165.0, None),
    "A40": (149.7, None),
    "A100": (312.0, None),
    "A800": (312.0, None),
    "RTX 3090": (71.0, None),
    "RTX 4090": (165.2, 330.3),
    "L4": (121.0, 242.0),
    "L40": (181.05, 362.0),
    "L40S": (362.05, 733.0),
    "H20": (148.0, 296.0),
    "H100": (989.4, 1978.9),
    "H100 PCIe": (756.0, 1513.0),
    "H100 NVL": (835.5, 1671.0),
    "H800": (989.4, 1978.9),
    "H200": (989.4, 1978.9),
    "H200 NVL": (835.5, 1671.0),
    "GH200": (989.4, 1978.9),
    "B200": (2250.0, 4500.0),
    "B300": (2250.0, 4500.0),
    "GB200": (2500.0, 5000.0),
    "GB300": (2500.0, 5000.0),
}


def peak_tflops(device: str, precision: Precision = "bf16") -> float | None:
    """Return the dense peak of *device* in TFLOP/s, None where it is not known.

    Args:
        device: A name as CUDA gives it, such as ``"NVIDIA H100 80GB HBM3"``.
        precision: Of the matrix products; the V100's is of fp16, for it has no bf16.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    fitting = [name for name in PEAK_TFLOPS if set(name.split()) <= words]
    if not fitting:
        return None
    bf16, fp8 = PEAK_TFLOPS[max(fitting, key=lambda name: len(name.split()))]
    return bf16 if precision == "bf16" else fp8


def model_flops_utilization(
    tflops_per_device: float, device: str, precision: Precision = "bf16"
) -> float | None:
    """Return model FLOP/s as a share of the device's dense peak, None where that is not known.

    Source: Chowdhery et al. 2022 (PaLM), appendix B; see the module for the formula.
    """
    peak = peak_tflops(device, precision)
    return None if peak is None else tflops_per_device / peak


@frozen(kw_only=True)
class Throughput:
    """How fast a job runs.

    Attributes:
        tokens_per_second: Over all devices.
        tflops_per_device: Model TFLOP/s of one device; 0 where the FLOPs of a token are not known.
    """

    tokens_per_second: float
    tflops_per_device: float


class ThroughputWindow:
    """Throughput over the last steps.

    Args:
        size: Steps that count.
        flops_per_token: Model FLOPs of forward and backward of one token; 0 where unknown.
        num_devices: Devices that share the work.
    """

    def __init__(
        self, size: int = 100, *, flops_per_token: float = 0.0, num_devices: int = 1
    ) -> None:
        if size < 1 or num_devices < 1:
            raise ValueError(f"size={size} and num_devices={num_devices} must be at least 1")
        self._marks: deque[tuple[float, int]] = deque(maxlen=size + 1)
        self._tokens = 0
        self._excluded = 0.0
        self._tflop_per_token = flops_per_token / num_devices / 1e12

    def add(self, tokens: int, *, now: float) -> None:
        """Count *tokens* done between the last call and *now*, in seconds of any clock.

        The first call only sets the start: its tokens were done in a time that nobody took.
        """
        self._tokens += tokens
        self._marks.append((now - self._excluded, self._tokens))

    def exclude(self, seconds: float) -> None:
        """Leave *seconds* of other work, such as an evaluation, out of the next step's time."""
        self._excluded += seconds

    def throughput(self) -> Throughput | None:
        """Return the rate from the oldest mark to the newest, None before there are two."""
        if len(self._marks) < 2:
            return None
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        if last <= first:
            return None
        rate = (after - before) / (last - first)
        return Throughput(tokens_per_second=rate, tflops_per_device=rate * self._tflop_per_token)
