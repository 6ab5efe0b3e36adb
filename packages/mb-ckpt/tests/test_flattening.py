# SPDX-License-Identifier: Apache-2.0
"""Plain data goes through JSON unchanged, and what cannot be stored is refused by name."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mb_ckpt import CheckpointError
from mb_ckpt.states import plain_tree
from mb_ckpt.states.flattening import flatten
from mb_config.records import TensorShard

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.binary(max_size=4)
)
keys = st.text(max_size=3) | st.integers() | st.sampled_from(["$tuple", "$tensor", "$dict", "a.b"])
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(trees)
def test_plain_data_comes_back_equal_and_of_the_same_types(value):
    stored = json.loads(json.dumps(flatten({"x": value}).tree, allow_nan=False))
    assert repr(plain_tree.decode(stored)) == repr({"x": value})


def test_nan_and_numpy_scalars_come_back_as_python_floats_and_integers():
    tree = flatten({"a": math.nan, "b": np.int64(3), "c": np.float32(0.5)}).tree
    back = plain_tree.decode(json.loads(json.dumps(tree, allow_nan=False)))
    assert math.isnan(back["a"])
    assert back["b"] == 3
    assert back["c"] == 0.5


def test_tensors_leave_no_trace_in_the_plain_data():
    tensor = torch.zeros(2)
    tree = flatten({"a": {"w": tensor, "n": 1}, "l": [tensor, tensor], "m": [tensor, 2]}).tree
    assert plain_tree.decode(tree) == {"a": {"n": 1}, "m": [None, 2]}
    filled = plain_tree.decode(tree, {"a.w": 7, "l.0": 8, "l.1": 9, "m.0": 10})
    assert filled == {"a": {"w": 7, "n": 1}, "l": [8, 9], "m": [10, 2]}


def make(**changes):
    values = {
        "key": "w", "data": torch.zeros(2, 3), "global_shape": (4, 3), "offset": (2, 0),
        "local_shape": (2, 3), "dtype": "float32",
    }  # fmt: skip
    return TensorShard(**{**values, **changes})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"f": print}}, r"'a\.f' is a builtin_function_or_method"),
        ({"a": {1, 2}}, "'a' is a set"),
        ({"a": {(1, 2): 3}}, r"key \(1, 2\)"),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, r"key 'a\.b'"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "'a' is .* on meta"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "lazy conjugate"),
        ({"a": make(dtype="bfloat16")}, "says dtype=bfloat16 but its data is float32"),
        ({"a": make(offset=(3, 0))}, r"'w': offset=\(3, 0\) .* outside of global_shape=\(4, 3\)"),
        ({"a": make(offset=(0,))}, "need 2 dimensions each"),
        ({"a": make(local_shape=(1, 3))}, r"data has shape \(2, 3\), expected \(1, 3\)"),
        ({"a": make(flat_range=(0, 4))}, r"data has shape \(2, 3\), expected \(4,\)"),
        ({"a": make(flat_range=(4, 9))}, r"flat_range=\(4, 9\) is not within the 6 elements"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(state, message):
    with pytest.raises(CheckpointError, match=message):
        flatten(state)


def test_a_tensor_subclass_is_refused_because_its_values_may_lie_elsewhere():
    class Elsewhere(torch.Tensor):
        pass

    with pytest.raises(CheckpointError, match="'w' is a Elsewhere: give its local piece"):
        flatten({"w": torch.zeros(2).as_subclass(Elsewhere)})
