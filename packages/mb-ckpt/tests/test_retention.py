# SPDX-License-Identifier: Apache-2.0
"""What goes and what stays, above all the only good step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mb_ckpt import Best, CheckpointStore
from mb_ckpt.places.retention import Retention, prune
from mb_ckpt.places.stores import open_store

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: math.nan, 6: 5.0, 7: 4.0}


@pytest.mark.parametrize(
    ("best", "kept"),
    [
        (Best(metric="loss"), [4, 7]),
        (Best(metric="loss", count=2), [2, 4, 7]),
        (Best(metric="loss", count=3), [2, 3, 4, 7]),
        (Best(metric="loss", mode="max"), [6, 7]),
        (Best(metric="accuracy"), [7]),
    ],
)
def test_the_best_by_a_metric_stay(tmp_path, best, kept):
    with CheckpointStore(tmp_path, keep_best=best) as store:
        for step, loss in LOSSES.items():
            store.save(step, {"w": torch.ones(1)}, metrics={"loss": loss}).result()
        assert store.steps() == kept
        assert store.inspect(7).metrics == {"loss": 4.0}


def test_rules_add_up(tmp_path):
    with CheckpointStore(
        tmp_path, keep_last=2, keep_every=3, keep_best=Best(metric="loss")
    ) as store:
        for step, loss in LOSSES.items():
            store.save(step, {"w": torch.ones(1)}, metrics={"loss": loss})
        store.wait()
        assert store.steps() == [3, 4, 6, 7]


@given(
    steps=st.sets(st.integers(0, 40), min_size=1),
    last=st.none() | st.integers(1, 5),
    every=st.none() | st.integers(1, 7),
)
def test_the_newest_and_every_kept_kind_are_never_superseded(steps, last, every):
    newest = max(steps)
    gone = set(Retention(keep_last=last, keep_every=every).superseded(steps, newest))
    left = steps - gone
    assert newest in left
    assert set(sorted(steps)[-(last or 1) :]) <= left
    assert {s for s in steps if every and s % every == 0} <= left
    if last is None and every is None:
        assert not gone
    else:
        assert len(left) <= max(last or 1, 1) + sum(1 for s in steps if every and s % every == 0)


def test_the_only_good_step_stays_when_the_newest_cannot_be_read(tmp_path, caplog):
    with CheckpointStore(tmp_path) as store:
        for step in (1, 2, 3):
            store.save(step, {"w": torch.ones(2)}).result()
    manifest = tmp_path / "step_00000003" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-10])
    assert prune(open_store(tmp_path), Retention(keep_last=1), 3) == []
    assert "step 3 in" in caplog.text
    with CheckpointStore(tmp_path, keep_last=1) as store:
        assert store.steps() == [1, 2]
        assert store.prune(dry_run=True) == [1]
        assert store.steps() == [1, 2]
        assert store.prune() == [1]
        assert store.steps() == [2]


def test_metrics_that_are_no_numbers_are_refused(tmp_path):
    with CheckpointStore(tmp_path) as store, pytest.raises(ValueError, match="could not convert"):
        store.save(1, {}, metrics={"loss": "low"})
    with pytest.raises(ValueError, match="mode"):
        Best(metric="loss", mode="least")
