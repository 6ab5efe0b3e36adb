# SPDX-License-Identifier: Apache-2.0
"""What somebody with a plain training loop sees."""

from __future__ import annotations

import copy
import errno
import logging
import os
import shutil
import threading

import pytest
import torch
from mb_ckpt import CheckpointBusyError, CheckpointError, CheckpointStore
from mb_ckpt.saving import staging, writing
from torch import nn


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "run") if request.param == "file" else f"memory://{tmp_path}"


def make_training(seed, width=8):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def train(parts, steps):
    losses = []
    for step in steps:
        x_BI = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        loss = (parts["model"](x_BI).squeeze(1) - x_BI.sum(1)).square().mean()
        parts["optimizer"].zero_grad()
        loss.backward()
        parts["optimizer"].step()
        parts["scheduler"].step()
        losses.append(loss.item())
    return losses


def test_training_goes_on_as_if_it_had_never_stopped(url):
    parts = make_training(0)
    train(parts, range(3))
    with CheckpointStore(url) as store:
        store.save(3, {**parts, "progress": {"step": 3, "seen": (1, 2)}})
        expected = train(parts, range(3, 8))
        fresh = make_training(1)
        plain = store.load({**fresh, "progress": {}})
    assert plain["progress"] == {"step": 3, "seen": (1, 2)}
    assert train(fresh, range(3, 8)) == expected


def test_the_background_owns_a_snapshot(tmp_path, monkeypatch):
    tensors = {str(i): torch.full((1000,), float(i)) for i in range(20)}
    begun, go = threading.Event(), threading.Event()
    write = writing.write_array

    def held(*args, **options):
        begun.set()
        assert go.wait(20)
        write(*args, **options)

    monkeypatch.setattr(writing, "write_array", held)
    with CheckpointStore(tmp_path) as store:
        handle = store.save(1, tensors)
        handle.wait_staged()
        assert begun.wait(20)
        for tensor in tensors.values():
            tensor.fill_(-1)
        assert not handle.done()
        assert store.steps() == []
        go.set()
        handle.result(20)
        assert handle.done()
        store.load(tensors)
    assert all((tensor == float(i)).all() for i, tensor in tensors.items())


def test_each_of_many_saves_in_a_row_holds_its_own_values(tmp_path):
    tensor = torch.zeros(5000)
    with CheckpointStore(tmp_path) as store:
        for step in range(1, 11):
            store.save(step, {"w": tensor.add_(1)}).wait_staged()
        for step in range(1, 11):
            store.load({"w": tensor}, step)
            assert (tensor == step).all()


def test_a_second_save_waits_or_is_refused_as_asked(tmp_path, monkeypatch):
    go = threading.Event()
    write = writing.write_array
    monkeypatch.setattr(writing, "write_array", lambda *a, **k: go.wait(20) and write(*a, **k))
    with CheckpointStore(tmp_path / "refuse", on_busy="refuse") as store:
        store.save(1, {"w": torch.ones(3)})
        with pytest.raises(CheckpointBusyError, match="step 2 was not saved: step 1 is still"):
            store.save(2, {"w": torch.ones(3)})
        go.set()
    go.clear()
    with CheckpointStore(tmp_path / "wait") as store:
        store.save(1, {"w": torch.ones(3)})
        threading.Timer(0.2, go.set).start()
        store.save(2, {"w": torch.ones(3)}).result()
        assert store.steps() == [1, 2]


def test_a_handle_says_when_time_is_up(tmp_path, monkeypatch):
    go = threading.Event()
    write = writing.write_array
    monkeypatch.setattr(writing, "write_array", lambda *a, **k: go.wait(20) and write(*a, **k))
    with CheckpointStore(tmp_path) as store:
        handle = store.save(1, {"w": torch.ones(3)})
        with pytest.raises(TimeoutError):
            handle.result(0.05)
        go.set()
        handle.result()


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"keep_last": 2}, [5, 6]),
        ({"keep_last": 1, "keep_every": 3}, [3, 6]),
        ({"keep_last": 2, "keep_every": 2}, [2, 4, 5, 6]),
        ({"keep_every": 4}, [4, 6]),
    ],
)
def test_retention_keeps_the_newest_and_every_nth(url, kept, expected):
    with CheckpointStore(url, **kept) as store:
        for step in range(1, 7):
            store.save(step, {"w": torch.ones(2)})
        store.wait()
        assert store.steps() == expected
        store.verify(expected[0])


def test_a_step_that_could_be_deleted_only_in_part_does_not_show(tmp_path, monkeypatch, caplog):
    def lose_data_and_fail(path):
        for file in path.glob("data-*/rank_*/c/*"):
            file.unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with CheckpointStore(tmp_path, keep_last=1) as store:
        store.save(1, {"w": torch.ones(2)}).result()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lose_data_and_fail)
            store.save(2, {"w": torch.ones(2)}).result()
        assert "could not delete old steps" in caplog.text
        assert store.steps() == [2]
        store.save(3, {"w": torch.ones(2)}).result()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_retention_leaves_later_steps_of_an_earlier_run_alone(tmp_path):
    with CheckpointStore(tmp_path) as store:
        for step in (10, 20, 30):
            store.save(step, {"w": torch.ones(2)})
    with CheckpointStore(tmp_path, keep_last=1) as store:
        store.save(15, {"w": torch.ones(2)}).result()
        assert store.steps() == [15, 20, 30]


def test_a_corrupt_step_is_not_counted_among_those_kept(tmp_path, caplog):
    with CheckpointStore(tmp_path, keep_last=2) as store:
        for step in (1, 2):
            store.save(step, {"w": torch.ones(2)}).result()
        manifest = tmp_path / "step_00000002" / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:-10])
        with caplog.at_level(logging.WARNING):
            store.save(3, {"w": torch.ones(2)}).result()
            assert store.steps() == [1, 3]
    assert "step_00000002/manifest.json is corrupt" in caplog.text


def test_saving_a_step_again_replaces_it(url):
    tensor = torch.zeros(3)
    with CheckpointStore(url) as store:
        store.save(5, {"w": torch.ones(3), "gone": torch.ones(2)}).result()
        store.save(5, {"w": torch.full((3,), 2.0)}).result()
        assert store.steps() == [5]
        assert list(store.inspect(5).tensors) == ["w"]
        store.load({"w": tensor})
        names = store._store.names("step_00000005")
    assert tensor.tolist() == [2, 2, 2]
    assert len(names) == 2, names


def test_inspect_tells_what_a_step_holds(url):
    state = {"a": torch.zeros(4, 3, dtype=torch.bfloat16), "b": [torch.zeros(())], "n": 7}
    with CheckpointStore(url) as store:
        store.save(12, state).result()
        info = store.inspect()
    assert info.step == 12
    assert {k: (t.dtype, t.shape, t.nbytes) for k, t in info.tensors.items()} == {
        "a": ("bfloat16", (4, 3), 24),
        "b.0": ("float32", (), 4),
    }
    assert info.nbytes == 28
    assert info.plain == {"n": 7}
    assert info.versions["torch"] == torch.__version__
    assert info.path.endswith("/step_00000012")


def test_a_state_without_tensors_is_a_checkpoint_too(url):
    with CheckpointStore(url) as store:
        store.save(0, {"n": 1})
        assert store.load({}) == {"n": 1}
        assert store.verify().nbytes == 0


def test_loading_where_nothing_is_says_so(url):
    with CheckpointStore(url) as store:
        assert store.steps() == []
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*check the path"):
            store.load({"w": torch.zeros(1)})
        with pytest.raises(CheckpointError, match=r"no step 7 in .*holds no checkpoint at all"):
            store.load({"w": torch.zeros(1)}, step=7)
        store.save(3, {"w": torch.zeros(1)}).result()
        with pytest.raises(CheckpointError, match=r"no step 7 in .*: it holds 3$"):
            store.load({"w": torch.zeros(1)}, step=7)


def test_what_does_not_fit_is_named_and_nothing_is_changed(url):
    tensors = {"w": torch.ones(2, 3), "v": torch.ones(4)}
    with CheckpointStore(url) as store:
        store.save(1, tensors)
        good = torch.zeros(2, 3)
        for other, message in [
            ({"w": good, "v": torch.zeros(5)}, r"v is float32\[4\] there, float32\[5\] here"),
            (
                {"w": good, "v": torch.zeros(4, dtype=torch.int64)},
                r"float32\[4\] there, int64\[4\]",
            ),
            ({"w": good, "vv": torch.zeros(4)}, "lacks vv; nearest to the first is 'v'"),
            ({"w": good, **{f"x{i}": good for i in range(12)}}, "x0, x1, .* and 2 more"),
        ]:
            with pytest.raises(CheckpointError, match=message):
                store.load(other)
        assert (good == 0).all()


def test_another_module_is_refused_with_what_is_missing_on_either_side(url):
    parts = make_training(0)
    with CheckpointStore(url) as store:
        store.save(1, parts)
        larger = nn.Sequential(*copy.deepcopy(parts["model"]), nn.Linear(1, 1))
        with pytest.raises(CheckpointError, match=r"'model' is not .*lacks model\.3\.bias, model"):
            store.load({"model": larger})
        with pytest.raises(CheckpointError, match=r"the module lacks model\.1\.bias"):
            store.load({"model": nn.Sequential(parts["model"][0])})
        with pytest.raises(CheckpointError, match="lacks 'opt', the state of a AdamW"):
            store.load({"opt": parts["optimizer"]})


def test_part_of_a_step_can_be_loaded(url):
    parts = make_training(0)
    train(parts, range(2))
    with CheckpointStore(url) as store:
        store.save(2, parts)
        fresh = make_training(1)
        store.load({"model": fresh["model"]})
        weight = torch.zeros(8, 5)
        store.load({"model": {"0": {"weight": weight}}})
    assert torch.equal(weight, parts["model"][0].weight)
    assert torch.equal(fresh["model"][0].weight, parts["model"][0].weight)


def test_the_extra_state_of_a_module_comes_back(url):
    class Counting(nn.Linear):
        calls = 0

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    module, fresh = Counting(2, 2), Counting(2, 2)
    module.calls = 5
    with CheckpointStore(url) as store:
        store.save(1, {"m": module})
        store.load({"m": fresh})
    assert fresh.calls == 5
    assert torch.equal(fresh.weight, module.weight)


def test_a_failure_nobody_asked_about_is_raised_at_close(tmp_path, caplog):
    (tmp_path / "run").write_text("in the way")
    store = CheckpointStore(tmp_path / "run")
    store.save(1, {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"preparing step 1 in .*run failed: .*exists"):
        store.close()
    assert "checkpoint of step 1 failed" in caplog.text


def test_a_synchronous_save_raises_at_once(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with CheckpointStore(tmp_path / "run", async_save=False) as store:
        with pytest.raises(CheckpointError, match=r"preparing step 1 in .*exists"):
            store.save(1, {"w": torch.ones(2)})
        (tmp_path / "run").unlink()
        assert store.save(2, {"w": torch.ones(2)}).done()
        assert store.steps() == [2]


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_a_step_is_a_whole_number(step, tmp_path):
    with CheckpointStore(tmp_path) as store, pytest.raises(CheckpointError, match="from 0 on"):
        store.save(step, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"keep_last": 0}, "keep_last"), ({"keep_every": 0}, "keep_every"), ({"on_busy": "x"}, "'x'")],
)
def test_bad_settings_fail_at_construction(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CheckpointStore(tmp_path, **settings)


def test_unknown_places_are_refused():
    with pytest.raises(CheckpointError, match="'ftp://host/run' is not supported"):
        CheckpointStore("ftp://host/run")


def test_a_file_url_and_a_path_are_the_same_place(tmp_path):
    with CheckpointStore(tmp_path / "a run") as store:
        store.save(4, {"n": 1})
    with CheckpointStore(f"file://{tmp_path}/a%20run") as store:
        assert store.steps() == [4]


def test_overlapping_pieces_and_holes_are_refused_at_save(tmp_path):
    from mb_config.records import TensorShard

    def piece(offset, rows):
        return TensorShard(
            key="w", data=torch.ones(rows, 2), global_shape=(4, 2), offset=(offset, 0),
            local_shape=(rows, 2), dtype="float32",
        )  # fmt: skip

    with CheckpointStore(tmp_path, async_save=False) as store:
        with pytest.raises(CheckpointError, match=r"'w'\[4, 2\] .*hold 6 of 8 elements"):
            store.save(1, {"w": [piece(0, 2), piece(3, 1)], "v": torch.ones(1)})
        with pytest.raises(CheckpointError, match=r"'w'.* two pieces overlap, .*replica_id"):
            store.save(1, {"w": [piece(0, 3), piece(2, 2)]})
        assert store.steps() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [[1000], [0, 0, 7, 900, 1, 0, 30], [10] * 50, [0]])
def test_copies_on_several_threads_copy_all(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(staging, "_LEAST_BYTES", 64)
    monkeypatch.setattr(staging, "processors", lambda: 3)
    state = {f"t{i}": torch.randn(n) for i, n in enumerate(sizes)}
    with CheckpointStore(tmp_path) as store:
        store.save(1, state)
        room = {key: torch.zeros_like(value) for key, value in state.items()}
        store.load(room, 1)
    assert all(torch.equal(room[key], value) for key, value in state.items())
