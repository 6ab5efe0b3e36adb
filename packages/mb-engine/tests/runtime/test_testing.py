# SPDX-License-Identifier: Apache-2.0
"""Functions on several ranks: results, environment, errors, time limits, no process left."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mb_engine.testing import RankError, reserved_port, run_ranks, tiny_config

pytestmark = pytest.mark.dist


def environment(extra):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    return [os.environ[name] for name in names], os.environ["MASTER_PORT"], extra


def write_to_both():
    os.write(1, f"out{os.environ['RANK']}\n".encode())
    os.write(2, f"err{os.environ['RANK']}\n".encode())


def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ValueError("the cause")
    time.sleep(60)


def die():
    os._exit(3)


def hang(folder):
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(60)


def nest():
    run_ranks(die, 1)


def tensor_of_rank():
    import torch

    return {"rank": int(os.environ["RANK"]), "tensor": torch.arange(3, dtype=torch.bfloat16)}


def imported():
    return [name in sys.modules for name in ("torch", "megatron.core")]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_rank_gets_its_environment_and_results_come_by_rank():
    results = run_ranks(environment, 2, {"x": 1})
    assert [r[0] for r in results] == [
        [str(rank), str(rank), "2", "127.0.0.1", "1"] for rank in range(2)
    ]
    assert results[0][1] == results[1][1]
    assert results[0][2] == {"x": 1}


def test_a_fresh_rank_has_nothing_imported():
    import torch

    assert run_ranks(imported, 1, fresh=True) == [[False, False]]
    assert run_ranks(imported, 1) == [[True, not torch.cuda.is_available()]]


def test_the_parents_environment_is_left_alone():
    before = dict(os.environ)
    run_ranks(environment, 1, None)
    assert dict(os.environ) == before


def test_an_error_of_one_rank_is_raised_with_its_traceback_and_ends_the_others():
    begun = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1:.*fail_on_rank_1.*ValueError: the cause"):
        run_ranks(fail_on_rank_1, 2)
    assert time.monotonic() - begun < 50


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RankError, match="rank 0 ended with exit code 3"):
        run_ranks(die, 1)


def test_ranks_that_hang_are_killed_and_reaped(tmp_path):
    with pytest.raises(RankError, match=r"ranks \[0, 1\] did not end in time"):
        run_ranks(hang, 2, tmp_path, timeout_s=4)
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_a_function_of_an_installed_module_runs_too():
    assert run_ranks(subprocess.getoutput, 1, "echo hello") == ["hello"]


def test_a_reserved_port_is_for_one_who_listens_and_given_to_no_other():
    with reserved_port() as port, contextlib.ExitStack() as sockets:
        others = [sockets.enter_context(socket.socket()) for _ in range(500)]
        for other in others:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 0))
        assert port not in {other.getsockname()[1] for other in others}
        # Not at the top: ranks load this file, and a fresh one imports nothing more.
        from torch.distributed import TCPStore

        TCPStore("127.0.0.1", port, 1, is_master=True).set("key", "value")


def test_the_tiny_configuration_takes_overrides():
    config = tiny_config("model.num_layers=2").finalize(1)
    assert (config.model.num_layers, config.train.num_microbatches) == (2, 4)


def test_a_rank_may_not_start_ranks():
    with pytest.raises(RankError, match="a rank called run_ranks: put the call under"):
        run_ranks(nest, 1)


@pytest.mark.parametrize("fresh", [False, True])
def test_ranks_write_where_this_process_does(fresh, capfd):
    run_ranks(write_to_both, 2, fresh=fresh)
    captured = capfd.readouterr()
    assert sorted(captured.out.split()) == ["out0", "out1"]
    assert sorted(captured.err.split()) == ["err0", "err1"]


def test_tensors_come_back():
    results = run_ranks(tensor_of_rank, 2)
    assert [r["rank"] for r in results] == [0, 1]
    assert results[1]["tensor"].tolist() == [0, 1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_die_with_their_parent(tmp_path):
    code = f"import test_testing, pathlib; test_testing.run_ranks(test_testing.hang, 1, pathlib.Path({str(tmp_path)!r}))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 30
    while not any(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    (pid,) = (int(path.read_text()) for path in tmp_path.iterdir())
    state = Path(f"/proc/{pid}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":  # a zombie awaits init alone
        assert time.monotonic() < deadline
        time.sleep(0.05)
