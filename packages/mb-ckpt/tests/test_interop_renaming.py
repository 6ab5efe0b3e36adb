# SPDX-License-Identifier: Apache-2.0
"""Which tensors are taken into another checkpoint, under which names and where in the state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mb_ckpt import CheckpointError
from mb_ckpt.interop.renaming import Renaming, move, tensors_in, without_tensors
from mb_ckpt.states.storable import TensorToRead

T = TensorToRead(dtype=torch.float32, shape=(1,), read_rows=lambda *_: torch.zeros(1))

STATE = {
    "model": {"layers": [{"w": T}, {"w": T}], "norm": T},
    "optimizer": {"state": {0: {"m": T}, 1: {"m": T}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    "rng": {"seed": 3},
    "flat.key": T,
    "epoch": 7,
}  # fmt: skip


def moved(**how):
    renaming = Renaming(**how)
    renaming.new_names(tensors_in(STATE))
    return move(STATE, renaming)


def test_nothing_to_rename_changes_nothing():
    assert moved() == STATE


def test_a_whole_entry_moves_with_its_plain_data_and_keys():
    found = moved(rename={"optimizer.": "train.opt."})
    assert found["train.opt"] is STATE["optimizer"]
    assert found["model"] == STATE["model"]
    assert "optimizer" not in found


def test_what_is_below_moves_alone_and_the_rest_stays():
    found = moved(rename={"optimizer.state.": "state.", "model.norm": "norm"})
    assert found["state"] is STATE["optimizer"]["state"]
    assert found["optimizer"] == {"param_groups": STATE["optimizer"]["param_groups"]}
    assert found["norm"] is T
    assert found["model"] == {"layers": STATE["model"]["layers"]}


def test_a_prefix_keeps_what_begins_with_it():
    assert moved(prefix="model.layers.") == {"model": {"layers": STATE["model"]["layers"]}}
    assert moved(prefix="model.layers.1") == {"model.layers.1": {"w": T}}
    assert moved(prefix="opt") == {"optimizer": STATE["optimizer"]}


def test_what_is_added_counts_for_tensors_and_their_company():
    found = moved(add="old.")
    assert found == {
        "rng": {"seed": 3}, "epoch": 7, "old.flat.key": T,
        "old.model": STATE["model"], "old.optimizer": STATE["optimizer"],
    }  # fmt: skip


def test_what_is_stripped_leaves_its_entries_at_the_top():
    assert moved(strip="model.")["layers"] == STATE["model"]["layers"]
    assert moved(strip="model.", prefix="model.", rename={"layers.": "l."}) == {
        "norm": T, "l": STATE["model"]["layers"],
    }  # fmt: skip


def test_plain_data_are_what_is_left_without_tensors():
    assert without_tensors(STATE | {"pair": (T, 1), "both": [T, T]}) == {
        "model": {"layers": [{}, {}]}, "rng": {"seed": 3}, "epoch": 7, "pair": (None, 1),
        "optimizer": {"state": {0: {}, 1: {}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    }  # fmt: skip


def test_the_longest_beginning_counts_and_entries_of_one_name_are_joined():
    found = moved(
        rename={"model.": "m.", "model.layers.0.": "m.first.", "flat.": "m.", "optimizer.": ""}
    )
    assert found["m.layers.1"] == {"w": T}
    assert found["m.first"] == {"w": T}
    assert found["m.norm"] is found["m.key"] is T
    assert found["state"] is STATE["optimizer"]["state"]
    assert moved(rename={"optimizer.": "model."})["model"] == {
        **STATE["model"], **STATE["optimizer"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"prefix": "modle."}, r"prefix='modle.' begins none of 6 keys: model.layers.0.w, .* and 1"),
        ({"rename": {"nrom": "x"}}, "rename 'nrom' begins none of 6 keys"),
        ({"prefix": "model.", "rename": {"optimizer.": "x."}}, "rename 'optimizer.' begins none of 3"),
        ({"strip": "net."}, "strip_prefix='net.' begins none of"),
        ({"rename": {"model.norm": "flat.key"}}, "'model.norm' and 'flat.key' would both be 'flat.key'"),
        ({"rename": {"model.norm": ""}}, "'model.norm' would have no name left"),
    ],
)  # fmt: skip
def test_what_fits_nothing_or_makes_two_keys_one_is_refused(how, text):
    with pytest.raises(CheckpointError, match=text):
        moved(**how)


def test_a_tensor_and_plain_data_of_one_name_are_refused():
    with pytest.raises(CheckpointError, match="two things would be 'epoch'"):
        moved(rename={"flat.key": "epoch"})
    with pytest.raises(CheckpointError, match=r"two things would be 'model\.norm'"):
        move({"model": {"norm": 1}, "m": {"norm": T}}, Renaming(rename={"m.": "model."}))


def fresh(_):
    return TensorToRead(dtype=torch.float32, shape=(1,), read_rows=lambda *_: torch.zeros(1))


NAMES = st.sampled_from(["a", "b", "aa", "c"])
NESTED = st.recursive(
    st.integers(0, 3).map(lambda n: n or fresh(n)),
    lambda inner: st.dictionaries(NAMES, inner, max_size=3) | st.lists(inner, max_size=3),
)
BEGINS = st.sampled_from(["", "a", "a.", "b.", "a.b", "a.b.", "c.0.", "a.0", "aa."])
RENAMES = st.dictionaries(BEGINS, BEGINS, max_size=2)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, NESTED, max_size=4), RENAMES, BEGINS, BEGINS, BEGINS)
def test_every_tensor_is_where_its_new_name_says(state, rename, prefix, strip, add):
    expected = {}
    before = {key: t for key, t in tensors_in(state).items() if key.startswith(prefix)}
    for whole, tensor in before.items():
        key = whole.removeprefix(strip)
        begin = max((old for old in rename if key.startswith(old)), key=len, default=None)
        expected[add + (key if begin is None else rename[begin] + key[len(begin) :])] = tensor
    assume(len(expected) == len(before) and "" not in expected)
    try:
        found = move(state, Renaming(rename=rename, prefix=prefix, strip=strip, add=add))
    except CheckpointError:
        return  # plain data are in the way
    else:
        assert tensors_in(found) == expected
