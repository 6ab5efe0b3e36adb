# SPDX-License-Identifier: Apache-2.0
"""A fast place and a second one: copied behind training, and the newest valid step of both wins."""

from __future__ import annotations

import errno
import os
import shutil
import threading

import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore, CorruptCheckpointError
from mb_ckpt.places import replication
from mb_ckpt.places.stores import FileStore


@pytest.fixture
def places(tmp_path):
    return tmp_path / "fast", tmp_path / "second"


def make(places, **settings):
    return CheckpointStore(places[0], replicate_to=places[1], **settings)


def state(step):
    return {"w": torch.full((40_000,), float(step)), "n": step}


def loaded(store, step=None):
    room = torch.zeros(40_000)
    found = store.load({"w": room}, step)
    assert (room == found["n"]).all()
    return found


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("layout", ["packed", "zarr"])
def test_every_committed_step_is_copied_whole(places, layout):
    with make(places, layout=layout) as store:
        for step in (1, 2):
            assert store.save(step, state(step)).replicated(20)
    assert files(places[0]) == files(places[1])
    shutil.rmtree(places[0])
    with make(places) as store:
        assert store.steps() == [1, 2]
        assert loaded(store).place == f"{places[1]}/step_00000002"
        assert loaded(store, 1)["n"] == 1


def test_each_place_keeps_what_it_is_told_to(places):
    with make(places, keep_last=1, replica_keep_last=3) as store:
        for step in range(1, 6):
            store.save(step, state(step)).replicated(20)
        assert store.steps() == [3, 4, 5]
    assert [p.name for p in places[0].iterdir()] == ["step_00000005"]
    assert len(list(places[1].iterdir())) == 3


def test_the_newest_valid_step_of_both_wins_and_damage_falls_back(places):
    with make(places) as store:
        for step in (1, 2):
            store.save(step, state(step)).replicated(20)
    with CheckpointStore(places[1]) as second:
        second.save(3, state(3)).result()
    with make(places) as store:
        assert loaded(store).step == 3, "it is in the second place only"
        (chunk,) = places[0].glob("step_00000002/data-*/*/c/0")
        raw = bytearray(chunk.read_bytes())
        raw[100] ^= 1
        chunk.write_bytes(raw)
        assert loaded(store, 2).place.startswith(str(places[1])), "the fast copy is damaged"
        (other,) = places[1].glob("step_00000002/data-*/*/c/0")
        other.write_bytes(raw)
        with pytest.raises(CorruptCheckpointError, match="is corrupt, it holds tensor 'w'"):
            loaded(store, 2)
        manifest = places[0] / "step_00000001" / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:-9])
        assert loaded(store, 1).place.startswith(str(places[1]))


def test_a_step_that_is_overtaken_is_left_out_and_none_is_deleted_while_it_is_copied(
    places, monkeypatch
):
    go, begun = threading.Event(), threading.Event()
    copy = replication.Replicator._copy

    def held(self, step):
        begun.set()
        assert go.wait(20)
        copy(self, step)

    monkeypatch.setattr(replication.Replicator, "_copy", held)
    with make(places, keep_last=1) as store:
        first = store.save(1, state(1))
        assert begun.wait(20)
        second, third = (store.save(step, state(step)) for step in (2, 3))
        third.result()
        assert store.steps() == [1, 2, 3]
        go.set()
        assert first.replicated(20)
        assert not second.replicated(20)
        assert third.replicated(20)
        store.save(4, state(4)).replicated(20)
        assert [p.name for p in places[0].iterdir()] == ["step_00000004"]
    assert sorted(p.name for p in places[1].iterdir()) == [
        "step_00000001", "step_00000003", "step_00000004",
    ]  # fmt: skip


def test_a_second_place_that_fails_is_reported_and_shows_no_half_step(places, monkeypatch, caplog):
    publish = FileStore.publish

    def full(self, path, data):
        if self.root == places[1] and "/c/" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(self, path, data)

    with make(places) as store:
        with monkeypatch.context() as patch:
            patch.setattr(FileStore, "publish", full)
            handle = store.save(1, state(1))
            handle.result()
            with pytest.raises(
                CheckpointError, match=r"disk full while copying step 1 to .*second"
            ):
                handle.replicated(20)
        assert "copying step 1" in caplog.text
        assert not list(places[1].iterdir())
        assert store.save(2, state(2)).replicated(20)
        assert store.steps() == [1, 2]


def test_a_second_place_that_cannot_be_reached_does_not_keep_from_loading(places, caplog):
    with CheckpointStore(places[0]) as store:
        store.save(1, state(1)).result()
    lost = "s3://nobody/run?endpoint=http://127.0.0.1:9"
    import tensorstore as ts
    from mb_ckpt.format import tensorstore_io

    with pytest.MonkeyPatch.context() as patch:
        retries = {"max_retries": 1, "initial_delay": "10ms", "max_delay": "20ms"}
        patch.setattr(tensorstore_io, "CONTEXT", ts.Context({"s3_request_retries": retries}))
        with CheckpointStore(places[0], replicate_to=lost) as store:
            assert loaded(store).step == 1
            assert "going on without it" in caplog.text
            shutil.rmtree(places[0])
            with pytest.raises(CheckpointError, match="no checkpoint in"):
                store.load({})
