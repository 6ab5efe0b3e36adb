# SPDX-License-Identifier: Apache-2.0
"""The checkpointer an engine gets from its configuration."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
import torch
from mb_ckpt import CheckpointBusyError, CheckpointError
from mb_ckpt.plugin import make_checkpointer
from mb_ckpt.saving import writing
from mb_config import CheckpointConfig
from mb_config.records import ProcessLayout


def make(**settings):
    return make_checkpointer(CheckpointConfig(**settings), ProcessLayout())


def test_the_entry_point_names_it():
    (point,) = entry_points(group="mb.checkpointers", name="tensorstore")
    assert point.load() is make_checkpointer


def test_saves_in_one_place_and_loads_from_another(tmp_path):
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    first = make(save=old)
    first.save(5, {"w": torch.ones(2)}).result()
    first.close()
    second, room = make(save=new, load=old), torch.zeros(2)
    assert second.steps() == [5]
    second.load({"w": room})
    assert room.tolist() == [1, 1]
    second.save(6, {"w": room}).result()
    assert second.steps() == [5]
    second.close()
    third = make(load=new)
    assert third.steps() == [6]
    third.close()


def test_says_which_setting_is_missing(tmp_path):
    nowhere = make()
    assert nowhere.steps() == []
    with pytest.raises(CheckpointError, match=r"checkpoint\.save=None"):
        nowhere.save(1, {})
    with pytest.raises(CheckpointError, match=r"checkpoint\.load=None"):
        nowhere.load({})
    nowhere.close()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [1, 2, 3, 4]),
        ({"most_recent_k": 2}, [3, 4]),
        ({"most_recent_k": 0}, [4]),
        ({"most_recent_k": 1, "save_retain_interval": 2}, [2, 4]),
        ({"save_retain_interval": 2}, [1, 2, 3, 4]),
    ],
)
def test_keeps_as_many_as_configured(tmp_path, settings, kept):
    checkpointer = make(save=str(tmp_path), **settings)
    for step in range(1, 5):
        checkpointer.save(step, {"w": torch.ones(1)}).result()
    assert checkpointer.steps() == kept
    checkpointer.close()


def test_async_save_and_async_queue_are_passed_on(tmp_path, monkeypatch):
    import threading

    go, write = threading.Event(), writing.write_array
    sync = make(save=str(tmp_path / "a"), async_save=False)
    assert sync.save(1, {"w": torch.ones(1)}).done()
    sync.close()
    monkeypatch.setattr(writing, "write_array", lambda *a, **k: go.wait(20) and write(*a, **k))
    refusing = make(save=str(tmp_path / "b"), async_queue="refuse")
    assert not refusing.save(1, {"w": torch.ones(1)}).done()
    with pytest.raises(CheckpointBusyError):
        refusing.save(2, {"w": torch.ones(1)})
    go.set()
    refusing.close()
