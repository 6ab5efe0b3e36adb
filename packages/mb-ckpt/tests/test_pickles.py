# SPDX-License-Identifier: Apache-2.0
"""Pickles only where they are asked for by name."""

from __future__ import annotations

import argparse
import enum
import json
import os
import threading

import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore
from mb_ckpt.cli import main
from mb_ckpt.states.plain_tree import Pickled


class Phase(enum.Enum):
    SFT = "sft"


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


TRAP = f"{__name__}.Trap"
ARGUMENTS = argparse.Namespace(lr=0.1, phase=Phase.SFT, shape=(1, 2))


def test_other_objects_are_refused_unless_pickles_are_allowed(tmp_path):
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(CheckpointError, match=r"'run\.args' is a Namespace.*allow pickles"):
            store.save(1, {"run": {"args": ARGUMENTS}})
        assert store.steps() == []


def test_pickled_objects_come_back_where_they_are_allowed(tmp_path):
    state = {"w": torch.ones(3), "args": ARGUMENTS, "deep": [{"phase": Phase.SFT}, 1.5, "text"]}
    with CheckpointStore(tmp_path, allow_pickle=True) as store:
        store.save(1, state)
        found = store.load({"w": torch.zeros(3)})
    assert found == {"args": ARGUMENTS, "deep": [{"phase": Phase.SFT}, 1.5, "text"]}


def test_plain_data_is_no_pickle_where_they_are_allowed(tmp_path):
    with CheckpointStore(tmp_path, allow_pickle=True) as store:
        plain = {"a": (1, None, b"x", float("inf")), 3: True}
        store.save(1, {"plain": plain}).result()
    assert "$pickle" not in (tmp_path / "step_00000001" / "manifest.json").read_text()
    with CheckpointStore(tmp_path) as store:
        assert store.load({})["plain"] == plain


@pytest.fixture
def trapped(tmp_path):
    """A step whose pickle makes a directory, and that directory."""
    sprung = tmp_path / "sprung"
    with CheckpointStore(tmp_path / "run", allow_pickle=True) as store:
        store.save(1, {"w": torch.ones(3), "extra": {"trap": Trap(sprung)}}).result()
    assert not sprung.exists()
    return tmp_path / "run", sprung


def test_a_pickle_is_refused_before_anything_is_filled(trapped):
    run, sprung = trapped
    room = torch.zeros(3)
    with CheckpointStore(run) as store:
        with pytest.raises(CheckpointError, match=rf"'extra\.trap' \({TRAP}\).*allow_pickle=True"):
            store.load({"w": room})
        assert (room == 0).all()
        found = store.load({"w": room}, only="w")
        assert (room == 1).all()
    kept = found["extra"]["trap"]
    assert isinstance(kept, Pickled)
    assert kept.name == TRAP
    assert not sprung.exists()


def test_looking_verifying_and_comparing_run_nothing(trapped, capsys):
    run, sprung = trapped
    with CheckpointStore(run) as store:
        store.verify()
        assert f"pickled {TRAP}" in repr(store.inspect().plain)
        assert not store.compare(store).differs
    assert main(["inspect", str(run)]) == 0
    assert main(["inspect", "--json", str(run)]) == 0
    assert f"pickled {TRAP}" in capsys.readouterr().out
    assert not sprung.exists()


def test_who_allows_pickles_runs_them(trapped):
    run, sprung = trapped
    with CheckpointStore(run, allow_pickle=True) as store:
        store.load({"w": torch.zeros(3)})
    assert sprung.is_dir()


def test_what_cannot_be_pickled_or_unpickled_is_named(tmp_path):
    with CheckpointStore(tmp_path, allow_pickle=True) as store:
        with pytest.raises(CheckpointError, match="'lock' is a lock, which cannot be pickled"):
            store.save(1, {"lock": threading.Lock()})
        store.save(2, {"phase": Phase.SFT}).result()
        path = tmp_path / "step_00000002" / "manifest.json"
        body = json.loads(path.read_text())["body"]
        assert body["tree"]["phase"]["$pickle"][0] == f"{__name__}.Phase"
        assert store.load({}) == {"phase": Phase.SFT}
    gone = Pickled("nowhere.Thing", b"cnowhere\nThing\n.")
    with CheckpointStore(tmp_path, allow_pickle=True) as store:
        store.save(3, {"gone": gone})
        with pytest.raises(CheckpointError, match=r"a stored nowhere\.Thing cannot be unpickled"):
            store.load({})
