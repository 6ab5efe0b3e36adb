# SPDX-License-Identifier: Apache-2.0
"""Which device this process computes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import torch
from attrs import frozen
from mb_config.errors import ConfigError, Violation

if TYPE_CHECKING:
    from mb_config import DistributedInitConfig


@frozen(kw_only=True)
class Device:
    """The device of one rank.

    Attributes:
        type: Kind of device.
        index: Which one on this machine; None for the CPU.
        local_rank: Rank on this machine.
        backend: What ranks communicate with.
    """

    type: Literal["cuda", "cpu"]
    index: int | None
    local_rank: int
    backend: Literal["nccl", "gloo"]

    @property
    def torch_device(self) -> torch.device:
        """The same as torch names it."""
        return torch.device(self.type) if self.index is None else torch.device("cuda", self.index)


def select_device(config: DistributedInitConfig) -> Device:
    """Return the device of this process: its GPU by local rank, or the CPU.

    ``device: cpu`` hides the GPUs of the machine from this process, because megatron-core would
    use them; that must happen before CUDA starts.

    Args:
        config: The ``dist`` section.

    Raises:
        ConfigError: If the wanted device is not there, or not with that backend.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if config.device == "cpu" and not started:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise _violation(
            "dist.device",
            "cuda",
            "torch finds no CUDA device",
            "set dist.device=cpu, or install a CUDA build of torch on a machine with a GPU",
        )
    if config.device == "cpu" and has_cuda:
        raise _violation(
            "dist.device",
            "cpu",
            "CUDA was started by this process before",
            "start the process with CUDA_VISIBLE_DEVICES= (empty)",
        )
    if not has_cuda:
        if config.distributed_backend == "nccl":
            raise _violation(
                "dist.distributed_backend",
                "nccl",
                "NCCL needs CUDA devices and torch finds none",
                "leave it out, or set gloo",
            )
        return Device(type="cpu", index=None, local_rank=local_rank, backend="gloo")
    if local_rank >= torch.cuda.device_count():
        raise _violation(
            "LOCAL_RANK",
            str(local_rank),
            f"this machine has {torch.cuda.device_count()} CUDA devices, one a rank",
            "start fewer ranks on it (--nproc)",
        )
    backend = config.distributed_backend or "nccl"
    return Device(type="cuda", index=local_rank, local_rank=local_rank, backend=backend)


def _violation(field: str, value: str, rule: str, remedy: str) -> ConfigError:
    violation = Violation(field=field, value=value, rule=rule, remedy=remedy)
    return ConfigError.from_violations([violation])
