# SPDX-License-Identifier: Apache-2.0
"""What the planner knows about GPUs, their links and what of them a run gets.

Source: NVIDIA's data sheets of A100, H100, H200 and B200 (SXM; dense rates; link bandwidth in one
direction, a network card of 200 or 400 Gb/s a GPU); memory as ``nvidia-smi`` reports it.
"""

from __future__ import annotations

from attrs import frozen

from mb_engine.errors import EngineError

_MIB = 1 << 20
_RESERVED_BYTES = 1536 * _MIB
_FRAGMENTED = 0.05


@frozen(kw_only=True)
class Gpu:
    """One kind of GPU in machines of one kind.

    Attributes:
        name: As given on the command line.
        memory_bytes: All of its memory.
        half_flops: Peak operations a second with 16-bit inputs, dense.
        single_flops: The same in float32, without TF32.
        memory_bandwidth: Bytes a second.
        link_bandwidth: Bytes a second to another GPU of the machine, in one direction.
        network_bandwidth: Bytes a second to another machine, in one direction.
        per_machine: GPUs in one machine.
    """

    name: str
    memory_bytes: int
    half_flops: float
    single_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    per_machine: int = 8

    @property
    def usable_bytes(self) -> int:
        """Memory that tensors can take.

        Set aside: 1.5 GiB for the CUDA context, kernels and communicators, and 5 % for what the
        caching allocator cannot hand out in one piece (own estimate).
        """
        return int((self.memory_bytes - _RESERVED_BYTES) * (1 - _FRAGMENTED))


_ALL = (
    Gpu(
        name="a100-40gb",
        memory_bytes=40_536 * _MIB,
        half_flops=312e12,
        single_flops=19.5e12,
        memory_bandwidth=1.555e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
    ),
    Gpu(
        name="a100-80gb",
        memory_bytes=81_251 * _MIB,
        half_flops=312e12,
        single_flops=19.5e12,
        memory_bandwidth=2.039e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
    ),
    Gpu(
        name="h100-80gb",
        memory_bytes=81_559 * _MIB,
        half_flops=989e12,
        single_flops=66.9e12,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    Gpu(
        name="h200-141gb",
        memory_bytes=143_771 * _MIB,
        half_flops=989e12,
        single_flops=66.9e12,
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    Gpu(
        name="b200-192gb",
        memory_bytes=183_359 * _MIB,
        half_flops=2.25e15,
        single_flops=75e12,
        memory_bandwidth=8e12,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
    ),
)
GPUS = {gpu.name: gpu for gpu in _ALL}
"""The GPUs that can be named."""


def gpu_named(name: str) -> Gpu:
    """Return the GPU called *name*.

    Raises:
        EngineError: If there is none; lists the names.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise EngineError(f"gpu={name}: must be one of {', '.join(GPUS)}; choose one of them")
    return found
