# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's optimizers, built from the configuration and at full speed on either device."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

import attrs
import torch
from packaging.version import Version

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mb_config import ConfigContainer

_SECTIONS = ("mixed_precision", "offload", "optimizer")  # a later one wins


def build_optimizer(
    config: ConfigContainer,
    chunks: Sequence[Any],
    *,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> Any:
    """Return the optimizer of all trainable parameters of *chunks*.

    Adam and SGD come from Transformer Engine or Apex where installed, else from torch. Muon takes
    the matrices of the layers and leaves the rest to Adam. Biases and one-dimensional parameters
    (norms) get no weight decay. Call it on all ranks together.

    Args:
        config: Resolved; every field of ``optimizer``, ``offload`` and ``mixed_precision`` whose
            name megatron-core's ``OptimizerConfig`` knows is passed on.
        chunks: This rank's model chunks, wrapped for data parallelism.
        overrides: More of ``optimizer.overrides``, ``pattern -> values`` for the parameters whose
            name matches the pattern as a shell would: ``max_lr``, ``min_lr``, ``start_wd``, ``end_wd``, ``wd_mult``, ``lr_mult``;
            `ParamScheduler` follows them.

    Returns:
        A ``megatron.core.optimizer.MegatronOptimizer``.

    Raises:
        EngineError: If what is asked for needs a device or a package that is not there.
    """
    _check_available(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core import optimizer as megatron

        from mb_engine.train.clipping import use_buffers

    settings = optimizer_settings(config)
    rules = megatron.get_standard_config_overrides(settings)
    for pattern, values in {**config.optimizer.overrides, **(overrides or {})}.items():
        rules[megatron.ParamKey(name=pattern)] = dict(values)
    built = megatron.get_megatron_optimizer(
        settings,
        list(chunks),
        config_overrides=rules,
        use_gloo_process_groups=config.dist.use_gloo_process_groups,
    )
    for inner in _torch_optimizers(built):
        _fuse_on_cpu(inner)
    return use_buffers(built, chunks)


def optimizer_settings(config: ConfigContainer) -> Any:
    """Return megatron-core's ``OptimizerConfig`` for the resolved *config*.

    Raises:
        EngineError: If megatron-core refuses the combination.
    """
    from megatron.core.optimizer import OptimizerConfig

    known = OptimizerConfig.__dataclass_fields__
    values: dict[str, Any] = {}
    for section in _SECTIONS:
        mine = getattr(config, section)
        fields = attrs.asdict(mine, recurse=False) if attrs.has(type(mine)) else {}
        values |= {k: v for k, v in fields.items() if k in known and v is not None}
        if section == "mixed_precision" and fields.get("fp8") is None:
            values.pop("fp8_recipe", None)  # a recipe counts as FP8 training there
    if "muon_use_nesterov" in known:  # its name in 0.16
        values["muon_use_nesterov"] = config.optimizer.muon_nesterov
    for name in [n for n in values if n.endswith("_dtype")]:
        values[name] = getattr(torch, values[name])
    try:
        return OptimizerConfig(**values)
    except (AssertionError, RuntimeError) as error:
        raise EngineError(f"the optimizer section cannot be used: {error}; change it") from error


def _check_available(config: ConfigContainer) -> None:
    if config.optimizer.optimizer == "sgd" and config.optimizer.use_distributed_optimizer:
        raise EngineError(
            "optimizer.optimizer=sgd cannot be combined with the distributed optimizer, which"
            " megatron-core has for Adam alone; set optimizer.use_distributed_optimizer to false"
        )
    if config.optimizer.optimizer == "muon":
        _check_muon()
    wants_te = config.optimizer.use_precision_aware_optimizer
    if wants_te and importlib.util.find_spec("transformer_engine") is None:
        raise EngineError(
            "optimizer.use_precision_aware_optimizer=True needs Transformer Engine;"
            ' pip install "mb-engine[te]", or set it to false'
        )
    if config.offload.optimizer_cpu_offload and not torch.cuda.is_available():
        raise EngineError(
            "offload.optimizer_cpu_offload=True moves states from a GPU, and there is none; set it"
            " to false"
        )


def _check_muon() -> None:
    """Refuse Muon where what it is made of is missing.

    Megatron-core 0.16 has another Muon, for an unreleased interface of emerging-optimizers.
    """
    megatron = Version(importlib.metadata.version("megatron-core"))
    has_it = importlib.util.find_spec("megatron.core.optimizer.emerging_optimizers") is not None
    if not has_it:
        raise EngineError(
            f"optimizer.optimizer=muon: needs megatron-core 0.19, installed is {megatron}; upgrade"
            " it, or use adam"
        )
    try:
        importlib.import_module("emerging_optimizers.orthogonalized_optimizers")
    except ImportError as error:
        raise EngineError(
            "optimizer.optimizer=muon: needs the package emerging-optimizers with triton and Python"
            f" 3.12 or newer ({error}); pip install emerging-optimizers, or use adam"
        ) from error


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the torch optimizers inside a megatron-core one; a rank without parameters has none."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [getattr(one, "optimizer", None) for one in chained]
    kinds = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
    return [one for one in inner if isinstance(one, kinds)]


def _fuse_on_cpu(optimizer: torch.optim.Optimizer) -> None:
    """Let torch update each CPU parameter in one pass.

    Its default there is one kernel an operation: fused was 3 to 5 times as fast for Adam on 2
    cores, 0.2 to 9 million parameters, with results equal to 2e-8. On CUDA torch's default is its
    multi-tensor path already.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.device.type == "cpu" and p.is_floating_point() for p in params):
        for group in optimizer.param_groups:
            group["fused"] = True
            group["foreach"] = False
