# SPDX-License-Identifier: Apache-2.0
"""A save that remembers the last state sees all that has changed in it."""

from __future__ import annotations

import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore
from mb_ckpt.states.flattening import flatten
from mb_ckpt.states.memo import Memo


def first():
    return {
        "model": {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
        "step": 1,
    }


CHANGES = {
    "values": {"model": {"a": torch.full((2, 3), 5.0), "b": torch.zeros(4, dtype=torch.bfloat16)}},
    "shape": {"model": {"a": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.bfloat16)}},
    "dtype": {"model": {"a": torch.ones(2, 3), "b": torch.ones(4)}},
    "name": {"model": {"a": torch.ones(2, 3), "c": torch.ones(4, dtype=torch.bfloat16)}},
    "order": {"model": {"b": torch.ones(4, dtype=torch.bfloat16), "a": torch.ones(2, 3)}},
    "kind": {"model": {"a": torch.ones(2, 3), "b": 4.5}},
    "count": {"model": {"a": torch.ones(2, 3)}},
    "nothing": {"model": {}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_differs_from_the_last_is_flattened_as_if_it_were_the_first(change):
    memo, state = Memo(), CHANGES[change]
    flatten(first(), memo=memo)
    again, alone = flatten(state, memo=memo), flatten(state)
    assert again.tree == alone.tree
    assert [t.data_ptr() for t in again.tensors] == [t.data_ptr() for t in alone.tensors]
    facts = [(s.key, s.dtype, s.shape, s.held, s.nbytes) for s in alone.specs]
    assert [(s.key, s.dtype, s.shape, s.held, s.nbytes) for s in again.specs] == facts


def test_a_state_of_other_values_alone_has_the_very_specs_of_the_last():
    memo = Memo()
    before = flatten(first(), memo=memo)
    after = flatten(CHANGES["values"], memo=memo)
    assert all(a is b for a, b in zip(before.specs, after.specs, strict=True))
    assert memo.mappings.keys() == {"model."}


def test_buffers_are_named_as_changing_each_time():
    module, memo = torch.nn.BatchNorm1d(3), Memo()
    expected = flatten({"first": torch.ones(1), "net": module}).changing
    assert len(expected) == 3
    for _ in range(2):
        flat = flatten({"first": torch.ones(1), "net": module}, memo=memo)
        assert flat.changing == expected
    # The same names, but no buffers any more.
    loose = {"first": torch.ones(1), "net": dict(module.state_dict())}
    assert flatten(loose, memo=memo).changing == []


def test_two_tensors_of_one_key_are_refused_whatever_came_before():
    memo = Memo()
    flatten({"a": {"b": torch.ones(1)}, "a.b": 3}, memo=memo)
    with pytest.raises(CheckpointError, match=r"two tensors of the state have the key 'a\.b'"):
        flatten({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, memo=memo)


def test_what_was_saved_second_is_what_is_loaded(tmp_path):
    with CheckpointStore(tmp_path) as store:
        for step, state in enumerate([first(), *CHANGES.values()]):
            store.save(step, state).result()
        for step, state in enumerate([first(), *CHANGES.values()]):
            tensors = {k: v for k, v in state["model"].items() if isinstance(v, torch.Tensor)}
            room = {k: torch.full_like(v, -3) for k, v in tensors.items()}
            store.load({"model": room}, step)
            assert all(torch.equal(room[k], tensors[k]) for k in tensors)
