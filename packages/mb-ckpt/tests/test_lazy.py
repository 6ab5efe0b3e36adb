# SPDX-License-Identifier: Apache-2.0
"""With lazy staging every save holds the state before the step that follows the fence."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore
from mb_ckpt.saving import stager
from torch import nn

SAVES = 200


def training(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def forward_backward(model, step):
    x_BI = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    model(x_BI).square().mean().backward()


def copied(model, optimizer):
    moments = optimizer.state_dict()["state"]
    state = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    for i, values in moments.items():
        state |= {f"optimizer.state.{i}.{k}": v.clone() for k, v in values.items()}
    return state


@pytest.fixture
def slow_copy(monkeypatch):
    """Let every copy begin late, so that whoever does not wait for it changes what is saved."""
    stage = stager.HostBuffer.stage

    def late(self, *args, **kwargs):
        time.sleep(0.002)
        return stage(self, *args, **kwargs)

    monkeypatch.setattr(stager.HostBuffer, "stage", late)


@pytest.mark.parametrize("fenced", [True, False])
def test_200_saves_each_hold_the_state_before_the_step_if_the_loop_waits(slow_copy, fenced):
    model, optimizer = training()
    expected = {}
    with CheckpointStore(f"memory://lazy-{fenced}", staging="lazy") as store:
        for step in range(SAVES):
            if step:
                expected[step] = copied(model, optimizer)
                handle = store.save(step, {"model": model, "optimizer": optimizer, "n": step})
            forward_backward(model, step)  # changes the buffers of the batch norm
            if step and fenced:
                handle.wait_staged()
            optimizer.step()
            optimizer.zero_grad()
        right = []
        for step, tensors in expected.items():
            room = {k: torch.full_like(v, -1) for k, v in tensors.items()}
            assert store.load(room, step)["n"] == step
            right.append(all(torch.equal(room[k], v) for k, v in tensors.items()))
    assert len(right) == SAVES - 1
    assert all(right) == fenced, "without the fence the test must see another state"


def test_save_returns_before_the_copy_and_the_fence_after_it(tmp_path, monkeypatch):
    go, begun = threading.Event(), threading.Event()
    stage = stager.HostBuffer.stage

    def held(self, *args, **kwargs):
        begun.set()
        assert go.wait(20)
        return stage(self, *args, **kwargs)

    monkeypatch.setattr(stager.HostBuffer, "stage", held)
    tensor, passed = torch.ones(1000), []
    with CheckpointStore(tmp_path, staging="lazy") as store:
        handle = store.save(1, {"w": tensor})
        assert begun.wait(20)
        waiting = threading.Thread(target=lambda: passed.append(handle.wait_staged()))
        waiting.start()
        waiting.join(0.05)
        assert not passed
        go.set()
        waiting.join(20)
        assert passed
        tensor.zero_()
        handle.result()
        store.load({"w": tensor})
    assert (tensor == 1).all()


def test_the_fence_opens_when_a_save_fails(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with CheckpointStore(tmp_path / "run", staging="lazy") as store:
        handle = store.save(1, {"w": torch.ones(3)})
        handle.wait_staged()
        with pytest.raises(CheckpointError, match="exists"):
            handle.result()
    with CheckpointStore(tmp_path / "other", staging="lazy") as store:
        with pytest.raises(CheckpointError, match="'w' is a builtin"):
            store.save(1, {"w": print})
        store.save(2, {"w": torch.ones(3)}).wait_staged()
        store.wait()
        assert store.steps() == [2]


def test_a_copy_that_fails_is_reported_and_the_next_save_succeeds(tmp_path, monkeypatch):
    for staging in ("lazy", "eager"):
        with CheckpointStore(tmp_path / staging, staging=staging) as store:
            with monkeypatch.context() as patch:
                patch.setattr(stager.HostBuffer, "stage", lambda *_, **__: 1 / 0)
                handle = store.save(1, {"w": torch.ones(3)})
                handle.wait_staged()
                with pytest.raises(CheckpointError, match="rank 0: copying to host memory failed"):
                    handle.result()
            store.save(2, {"w": torch.ones(3)}).result()
            assert store.steps() == [2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("writer", ["thread", "process"])
@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_on_cuda_what_is_queued_after_the_fence_does_not_change_what_is_saved(
    tmp_path, writer, staging
):
    tensors = {f"t{i}": torch.zeros(1 << 20, device="cuda") for i in range(16)}
    with CheckpointStore(tmp_path, staging=staging, writer=writer) as store:
        for step in range(1, 6):
            for i, tensor in enumerate(tensors.values()):
                tensor.fill_(step + i / 16)
            handle = store.save(step, tensors)
            handle.wait_staged()
            for tensor in tensors.values():
                tensor.fill_(-1)
        for step in range(1, 6):
            store.load(tensors, step)
            assert all((t == step + i / 16).all() for i, t in enumerate(tensors.values()))


def test_an_unchanged_structure_is_planned_once(monkeypatch, tmp_path):
    from mb_ckpt.saving import planning

    made = []
    make_plan = planning.make_plan
    monkeypatch.setattr(planning, "make_plan", lambda o: made.append(1) or make_plan(o))
    state = {"a": torch.ones(3), "b": [torch.ones(2), {"c": torch.zeros(4, 4)}]}
    with CheckpointStore(tmp_path, async_save=False) as store:
        for step in range(3):
            store.save(step, {**state, "a": torch.ones(3) * step})
        assert len(made) == 1
        store.save(3, {**state, "a": torch.ones(4)})
        store.save(4, {**state, "d": torch.ones(4)})
        assert len(made) == 3
        room = torch.zeros(3)
        store.load({"a": room}, 2)
        assert (room == 2).all()
        store.load({"d": torch.zeros(4)}, 4)
