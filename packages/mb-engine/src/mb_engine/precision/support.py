# SPDX-License-Identifier: Apache-2.0
"""Whether this machine has what FP8, FP4 and other parts of Transformer Engine need."""

from __future__ import annotations

import importlib.metadata
import os
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from mb_config import MixedPrecisionConfig
from packaging.version import Version

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from mb_config import ConfigContainer

_NAMES = {(8, 9): "Ada", (9, 0): "Hopper", (10, 0): "Blackwell"}


@frozen(kw_only=True)
class Needs:
    """What one way of scaling needs.

    Attributes:
        capability: Lowest CUDA compute capability.
        engine: Lowest version of Transformer Engine.
        name: Named precision without its 16-bit part, such as ``with_mxfp8_mixed``.
        instead: Scalings that come nearest, best first.
    """

    capability: tuple[int, int]
    engine: str
    name: str
    instead: tuple[str, ...] = ()


# Capabilities: transformer_engine/pytorch/quantization.py, check_*_support. Versions of Transformer
# Engine: megatron/core/fp8_utils.py and fp4_utils.py.
SCALINGS = {
    "delayed": Needs(capability=(8, 9), engine="1.0", name="with_fp8_delayed_scaling_mixed"),
    "tensorwise": Needs(
        capability=(8, 9),
        engine="2.2",
        name="with_fp8_current_scaling_mixed",
        instead=("delayed",),
    ),
    "blockwise": Needs(
        capability=(9, 0),
        engine="2.3",
        name="with_fp8_subchannel_scaling_mixed",
        instead=("tensorwise", "delayed"),
    ),
    "mxfp8": Needs(
        capability=(10, 0),
        engine="2.1",
        name="with_mxfp8_mixed",
        instead=("blockwise", "tensorwise", "delayed"),
    ),
    "nvfp4": Needs(
        capability=(10, 0),
        engine="2.7",
        name="with_nvfp4_mixed",
        instead=("mxfp8", "blockwise", "tensorwise", "delayed"),
    ),
}


@frozen(kw_only=True)
class Machine:
    """What there is to compute with.

    Attributes:
        capability: CUDA compute capability; None without CUDA.
        engine: Version of Transformer Engine; None where it is not installed.
        megatron: Version of megatron-core.
    """

    capability: tuple[int, int] | None
    engine: Version | None
    megatron: Version

    @classmethod
    def here(cls) -> Machine:
        """Return what this process sees."""
        on_cuda = torch.cuda.is_available()
        return cls(
            capability=torch.cuda.get_device_capability() if on_cuda else None,
            engine=_version("transformer-engine"),
            megatron=_version("megatron-core") or Version("0"),
        )

    def lacks(self, needs: Needs) -> list[str]:
        """Return what of *needs* is missing, in words; an empty list if it can run."""
        missing = []
        if self.capability is None:
            missing.append("a CUDA device")
        elif self.capability < needs.capability:
            wanted = ".".join(map(str, needs.capability))
            has = ".".join(map(str, self.capability))
            missing.append(
                f"compute capability {wanted} ({_NAMES[needs.capability]}), this GPU has {has}"
            )
        if self.engine is None:
            missing.append(f"Transformer Engine {needs.engine}, which is not installed")
        elif self.engine < Version(needs.engine):
            missing.append(f"Transformer Engine {needs.engine}, installed is {self.engine}")
        return missing


def _version(package: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def check_precision(config: ConfigContainer, machine: Machine | None = None) -> None:
    """Refuse a precision that this machine cannot compute in, before anything is built.

    Args:
        config: Resolved.
        machine: What there is; this machine if None.

    Raises:
        EngineError: Naming what is missing and the nearest named precision that works here.
    """
    mixed = config.mixed_precision
    if not isinstance(mixed, MixedPrecisionConfig) or not (mixed.fp8 or mixed.fp4):
        return
    machine = machine or Machine.here()
    field = "fp8_recipe" if mixed.fp8 else "fp4_recipe"
    scaling = getattr(mixed, field)
    half = "fp16" if mixed.fp16 else "bf16"
    missing = machine.lacks(SCALINGS[scaling])
    if missing:
        raise EngineError(
            f"mixed_precision.{field}={scaling}: needs {' and '.join(missing)}; the nearest that"
            f" works here is mixed_precision={nearest(scaling, half, machine)}"
        )
    if mixed.fp4_param and machine.megatron < Version("0.19"):
        raise EngineError(
            f"mixed_precision.fp4_param=True: needs megatron-core 0.19, installed is"
            f" {machine.megatron}; set it to false to keep parameters in {half}"
        )


def nearest(scaling: str, half: str, machine: Machine) -> str:
    """Return the named precision closest to *scaling* that *machine* can compute in."""
    for other in SCALINGS[scaling].instead:
        if not machine.lacks(SCALINGS[other]):
            return f"{half}_{SCALINGS[other].name}"
    return f"{half}_mixed"


def check_engine_layers(
    config: ConfigContainer, layer_spec: str, machine: Machine | None = None
) -> None:
    """Refuse what only Transformer Engine's layers do where they are not used, or are too old.

    Args:
        config: Resolved.
        layer_spec: What the model is made of, ``te`` or ``torch``.
        machine: What there is; this machine if None.

    Raises:
        EngineError: Naming the field and what it needs.
    """
    offload = config.offload
    wanted = {
        "comm_overlap.tp_comm_overlap": config.comm_overlap.tp_comm_overlap,
        "comm_overlap.delay_wgrad_compute": config.comm_overlap.delay_wgrad_compute,
        "offload.cpu_offloading": offload.cpu_offloading,
    }
    fields = [field for field, is_on in wanted.items() if is_on]
    if fields and layer_spec != "te":
        raise EngineError(
            f"{fields[0]}=True: needs Transformer Engine layers, and model.layer_spec="
            f"{config.model.layer_spec} gives those of torch here; set it to false, or"
            ' pip install "mb-engine[te]" on a machine with CUDA'
        )
    engine = (machine or Machine.here()).engine if fields else None
    if engine is None:
        return
    if config.comm_overlap.delay_wgrad_compute and engine < Version("2.7"):
        raise EngineError(
            f"comm_overlap.delay_wgrad_compute=True: needs Transformer Engine 2.7, installed is"
            f" {engine}; set it to false"
        )
    new_way = engine >= Version("2.10") and os.environ.get("NVTE_CPU_OFFLOAD_V1", "0") != "1"
    if offload.cpu_offloading and new_way:
        raise EngineError(
            f"offload.cpu_offloading=True: megatron-core offloads by the first interface of"
            f" Transformer Engine, which {engine} has with NVTE_CPU_OFFLOAD_V1=1; set"
            " env_vars.NVTE_CPU_OFFLOAD_V1=1"
        )
