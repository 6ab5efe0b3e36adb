# SPDX-License-Identifier: Apache-2.0
"""Process groups: from torchrun's environment to this rank's place in the job."""

from __future__ import annotations

import itertools
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from mb_config.pipeline import stage_chunks
from mb_config.records import ProcessLayout
from torch.distributed.rendezvous import rendezvous

from mb_engine.errors import EngineError
from mb_engine.runtime import megatron_compat, megatron_cpu
from mb_engine.runtime.device import Device, select_device

if TYPE_CHECKING:
    from mb_config import ConfigContainer
    from mb_config.sections.model import ModelConfig

_STORES: dict[tuple[str, str], Any] = {}  # the launcher's, or rank 0's: it lives with the process
_ROUNDS = itertools.count()
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size_from_environment() -> int:
    """Return the number of ranks that the launcher started; 1 without a launcher.

    Raises:
        EngineError: If the launcher's variables are incomplete.
    """
    found = [name for name in _LAUNCH_VARIABLES if name in os.environ]
    # A stray MASTER_ADDR or MASTER_PORT of a cluster's profile is no launch.
    if "RANK" not in found and "WORLD_SIZE" not in found:
        return 1
    missing = [name for name in _LAUNCH_VARIABLES if name not in found]
    if missing:
        raise EngineError(
            f"{', '.join(found)} are set but {', '.join(missing)} not: start all ranks with"
            " torchrun or mb-train, or unset them to run on one rank"
        )
    return int(os.environ["WORLD_SIZE"])


def initialize(config: ConfigContainer) -> ProcessLayout:
    """Set up device, process groups and megatron-core on this rank; call it on all ranks.

    Without a launcher this is a job of one rank, which opens no port.

    Args:
        config: Resolved for the number of ranks that the launcher started.

    Returns:
        This rank's place and its process groups.

    Raises:
        ConfigError: If the wanted device is not there.
        EngineError: If the ranks cannot find each other, or are not as many as *config* expects.
    """
    model, world_size = config.model, world_size_from_environment()
    ranks_a_model = (
        model.tensor_model_parallel_size
        * model.pipeline_model_parallel_size
        * model.context_parallel_size
    )
    expected = ranks_a_model * (config.train.data_parallel_size or 1)
    if expected != world_size:
        raise EngineError(
            f"the configuration is resolved for {expected} ranks, but {world_size} were started;"
            f" resolve it with finalize(world_size={world_size}), or start {expected}"
        )
    _set_environment(config)
    device = select_device(config.dist)
    if device.type == "cpu":
        megatron_cpu.install()
    else:
        torch.cuda.set_device(device.torch_device)
    megatron_compat.prepare_megatron()
    _connect(device, minutes=config.dist.distributed_timeout_minutes)
    _make_groups(config, device)
    return _layout(config, device)


def shutdown() -> None:
    """Leave all process groups; does nothing where there are none."""
    if not torch.distributed.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _set_environment(config: ConfigContainer) -> None:
    """Set variables that libraries read when they start, where the user has not set them."""
    model = config.model
    for name, value in config.env_vars.items():
        os.environ.setdefault(name, str(value))
    if model.tensor_model_parallel_size * model.context_parallel_size > 1:
        # Lets communication start before the kernel that overlaps with it; megatron-core asks.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if model.deterministic_mode:
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)


def _connect(device: Device, *, minutes: float) -> None:
    if torch.distributed.is_initialized():
        raise EngineError(
            "process groups exist already in this process: call"
            " mb_engine.runtime.distributed.shutdown() before initialize()"
        )
    timeout = timedelta(minutes=minutes)
    store, rank, world_size = _rendezvous(device, timeout)
    torch.distributed.init_process_group(
        device.backend, store=store, rank=rank, world_size=world_size, timeout=timeout
    )


def _rendezvous(device: Device, timeout: timedelta) -> tuple[Any, int, int]:
    """Return a store that is new to this round of process groups, the rank and their number."""
    if "RANK" not in os.environ:
        return torch.distributed.HashStore(), 0, 1  # type: ignore[attr-defined]
    if device.backend == "gloo" and _on_one_machine():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    if meeting not in _STORES:
        try:
            _STORES[meeting] = next(rendezvous("env://", rank, world_size, timeout=timeout))[0]
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
            raise EngineError(_no_rendezvous(error)) from error
    # A process may form its groups several times: what they wrote must not meet again.
    prefix = f"round_{next(_ROUNDS)}"
    store = torch.distributed.PrefixStore(prefix, _STORES[meeting])  # type: ignore[attr-defined]
    return store, rank, world_size


def _no_rendezvous(error: Exception) -> str:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"MASTER_PORT={port}: another process of this machine uses that port; choose a free"
            " one, or let the launcher do so (torchrun --standalone)"
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at"
        f" MASTER_ADDR={address} MASTER_PORT={port} ({reason}); check that all ranks were started"
        " and that the address is reachable"
    )


def _on_one_machine() -> bool:
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is not None:
        return local == os.environ["WORLD_SIZE"]
    return os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1")


def _loopback() -> str:
    """Return the name of the loopback interface, which works where host names do not resolve."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return names[0] if names else "lo"


def _make_groups(config: ConfigContainer, device: Device) -> None:
    from megatron.core import parallel_state

    model, dist = config.model, config.dist
    nccl_only: dict[str, Any] = {}
    if device.backend == "nccl":
        nccl_only = {
            "nccl_communicator_config_path": dist.nccl_communicator_config_path,
            "high_priority_stream_groups": dist.high_priority_stream_groups,
        }
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        hierarchical_context_parallel_sizes=model.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=model.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=config.ddp.num_distributed_optimizer_instances,
        distributed_timeout_minutes=dist.distributed_timeout_minutes,
        order="tp-cp-ep-pp-dp" if dist.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        create_gloo_process_groups=dist.use_gloo_process_groups,
        **_embedding_ranks(model),
        **nccl_only,
    )


def _embedding_ranks(model: ModelConfig) -> dict[str, Any]:
    """Return which ranks of a pipeline hold the embedding, if not the first and the last alone."""
    if not model.mtp_num_layers or model.pipeline_model_parallel_layout is None:
        return {}
    holders = {0} | {
        stage for stage, chunks in enumerate(stage_chunks(model)) if any(c.mtp for c in chunks)
    }
    return {"get_embedding_ranks": lambda ranks: [ranks[stage] for stage in sorted(holders)]}


def _layout(config: ConfigContainer, device: Device) -> ProcessLayout:
    from megatron.core import parallel_state as state

    model = config.model
    return ProcessLayout(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=device.local_rank,
        device=str(device.torch_device),
        tp=state.get_tensor_model_parallel_world_size(),
        pp=state.get_pipeline_model_parallel_world_size(),
        vpp=model.virtual_pipeline_model_parallel_size or 1,
        cp=state.get_context_parallel_world_size(),
        dp=state.get_data_parallel_world_size(),
        ep=state.get_expert_model_parallel_world_size(),
        etp=state.get_expert_tensor_parallel_world_size(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        pp_rank=state.get_pipeline_model_parallel_rank(),
        cp_rank=state.get_context_parallel_rank(),
        dp_rank=state.get_data_parallel_rank(),
        ep_rank=state.get_expert_model_parallel_rank(),
        groups={
            "tp": state.get_tensor_model_parallel_group(),
            "pp": state.get_pipeline_model_parallel_group(),
            "cp": state.get_context_parallel_group(),
            "dp": state.get_data_parallel_group(),
            "dp_cp": state.get_data_parallel_group(with_context_parallel=True),
            "ep": state.get_expert_model_parallel_group(),
            "mp": state.get_model_parallel_group(),
            "world": torch.distributed.group.WORLD,
        },
    )
