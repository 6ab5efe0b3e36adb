# SPDX-License-Identifier: Apache-2.0
"""The record a run begins with."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import TYPE_CHECKING

import torch
from mb_config.records import RunInfo

from mb_engine.parallel.parameters import count_parameters

if TYPE_CHECKING:
    from mb_engine.train.engine import Engine

_REPORTED = (
    "mb-config",
    "mb-engine",
    "mb-ckpt",
    "mb-peft",
    "mb-distill",
    "mb-logging",
    "megatron-core",
    "transformer-engine",
    "torch",
)


def run_info(engine: Engine) -> RunInfo:
    """Return what is known when *engine* starts to train; call it on all ranks together."""
    from mb_engine.model.flops import flops_per_token

    config, layout = engine.config, engine.layout
    return RunInfo(
        run_name=config.logger.run_name or "run",
        config=config.to_dict(),
        layout=layout.describe(),
        world_size=layout.world_size,
        device=describe_device(layout.device),
        start_step=engine.progress.step,
        total_steps=config.train.train_iters,
        sequence_length=config.model.seq_length,
        num_parameters=count_parameters(engine.model_shards(), engine.layout.device),
        flops_per_token=flops_per_token(config),
        versions=installed_versions(),
    )


def describe_device(device: str) -> str:
    """Return the device's model name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"CPU ({platform.machine()})"


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a run's numbers, where installed."""
    found = {}
    for name in _REPORTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
