# SPDX-License-Identifier: Apache-2.0
"""Process groups and devices: places of ranks, several rounds, and errors in one line."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from mb_config import ConfigError
from mb_engine.errors import EngineError
from mb_engine.runtime.device import select_device
from mb_engine.runtime.distributed import initialize, shutdown, world_size_from_environment
from mb_engine.testing import reserved_port, run_ranks, tiny_config

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA")
LAUNCHED = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}


@pytest.fixture(autouse=True)
def leave_groups(monkeypatch):
    for name in (*LAUNCHED, "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.delenv(name, raising=False)
    yield
    shutdown()


def places_of_rank(rounds):
    """Return where this rank is in each layout, and the sum of the ranks in its groups."""
    places = []
    for overrides in rounds:
        config = tiny_config(*overrides).finalize(world_size_from_environment())
        layout = initialize(config)
        sums = {}
        for axis, group in layout.groups.items():
            total = torch.tensor([layout.rank])
            torch.distributed.all_reduce(total, group=group)
            sums[axis] = int(total)
        place = {
            n: getattr(layout, n) for n in ("rank", "tp_rank", "pp_rank", "cp_rank", "dp_rank")
        }
        places.append((place, sums, layout.describe(), os.environ["GLOO_SOCKET_IFNAME"]))
        shutdown()
    return places


TP, PP = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"


@pytest.mark.dist
def test_ranks_take_their_places_in_one_layout_after_another():
    rounds = [(TP,), (PP,), ("model.context_parallel_size=2",), ()]
    first, second = run_ranks(places_of_rank, 2, rounds)
    axes = ["tp", "pp", "cp", "dp"]
    for axis, a, b in zip(axes, first, second, strict=True):
        assert [a[0][f"{x}_rank"] for x in axes] == [0, 0, 0, 0]
        assert [b[0][f"{x}_rank"] for x in axes] == [int(x == axis) for x in axes]
        for place, sums, words, interface in (a, b):
            rank = place["rank"]
            alone = {x: rank for x in axes if x != axis}
            assert {x: sums[x] for x in alone} == alone
            assert sums[axis] == sums["world"] == 1
            assert words == f"{axis.upper()}2"
            assert interface.startswith("lo")
        assert a[1]["dp_cp"] == (1 if axis in ("dp", "cp") else 0)
        assert a[1]["mp"] == (1 if axis in ("tp", "pp") else 0)


@pytest.mark.dist
def test_four_ranks_order_pipeline_before_data_on_request():
    order = ["dist.use_tp_pp_dp_mapping=true"]
    ranks = run_ranks(places_of_rank, 4, [(PP,), (PP, *order)])
    assert [r[0][0]["pp_rank"] for r in ranks] == [0, 0, 1, 1]
    assert [r[1][0]["pp_rank"] for r in ranks] == [0, 1, 0, 1]


def test_a_job_of_one_rank_needs_no_launcher_and_no_port():
    layout = initialize(tiny_config().finalize(1))
    assert (layout.rank, layout.world_size, layout.device) == (0, 1, "cpu")
    assert layout.describe() == "1 rank"
    assert "MASTER_PORT" not in os.environ
    with pytest.raises(EngineError, match=r"exist already in this process: call .*shutdown"):
        initialize(tiny_config().finalize(1))


def test_shutdown_may_be_called_twice():
    initialize(tiny_config().finalize(1))
    shutdown()
    shutdown()
    assert not torch.distributed.is_initialized()


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in (LAUNCHED | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        message = rf"^MASTER_PORT={port}: another process .* uses that port; choose a free one"
        with pytest.raises(EngineError, match=message) as caught:
            initialize(tiny_config().finalize(1))
    assert "\n" not in str(caught.value)


def test_ranks_that_do_not_come_are_reported_after_the_timeout(monkeypatch):
    config = tiny_config(TP, "dist.distributed_timeout_minutes=0.02").finalize(2)
    message = r"^rank 1 of 2 could not join the others at MASTER_ADDR=127.0.0.1 MASTER_PORT=\d+ \("
    with reserved_port() as port:
        environment = LAUNCHED | {"MASTER_PORT": str(port), "RANK": "1", "WORLD_SIZE": "2"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(EngineError, match=message) as caught:
            initialize(config)
    assert "\n" not in str(caught.value)


def test_another_number_of_ranks_than_the_configuration_is_for_is_refused():
    message = "is resolved for 2 ranks, but 1 were started; resolve it with finalize.world_size=1"
    with pytest.raises(EngineError, match=message):
        initialize(tiny_config(TP).finalize(2))


def test_half_a_launch_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match=r"RANK, WORLD_SIZE are set but MASTER_ADDR, MASTER_PORT"):
        world_size_from_environment()


def test_addresses_without_ranks_are_no_launch(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    assert world_size_from_environment() == 1


@no_cuda
def test_the_device_is_the_cpu_where_there_is_no_other(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    for wanted in ("auto", "cpu"):
        device = select_device(tiny_config(f"dist.device={wanted}").dist)
        assert (device.type, device.backend, device.index) == ("cpu", "gloo", None)
        assert (device.local_rank, str(device.torch_device)) == (3, "cpu")


@no_cuda
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "dist.device=cuda",
            r"dist\.device=cuda: torch finds no CUDA device; set dist\.device=cpu",
        ),
        ("dist.distributed_backend=nccl", r"dist\.distributed_backend=nccl: NCCL needs CUDA"),
    ],
)
def test_a_device_that_is_not_there_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        select_device(tiny_config(override).dist)


def test_more_ranks_than_gpus_of_a_machine_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK=2: this machine has 2 CUDA devices"):
        select_device(tiny_config("dist.device=cuda").dist)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device = select_device(tiny_config("dist.device=cuda").dist)
    assert (str(device.torch_device), device.backend) == ("cuda:1", "nccl")


def test_deterministic_mode_asks_torch_and_the_libraries_for_it(monkeypatch):
    for name in ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    try:
        initialize(tiny_config("model.deterministic_mode=true").finalize(1))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NCCL_ALGO"] == "Tree"
    finally:
        torch.use_deterministic_algorithms(mode=False)
