# SPDX-License-Identifier: Apache-2.0
"""Box algebra against numpy's own indexing."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from mb_ckpt.states.boxes import Box, cover_fault, cut, extent, flat_boxes, strides

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def index(box):
    return tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))


@st.composite
def boxes_within(draw, shape):
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    extents = (draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    return Box(offset, tuple(extents))


@given(shape=shapes, data=st.data())
def test_a_flat_range_is_the_concatenation_of_its_boxes(shape, data):
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    whole = np.arange(prod(shape)).reshape(shape)
    boxes = flat_boxes(shape, start, stop)
    found = [whole[index(box)].ravel() for box in boxes]
    assert np.concatenate([np.empty(0, int), *found]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(shape=shapes, data=st.data())
def test_the_intersection_holds_exactly_the_common_elements(shape, data):
    a, b = data.draw(boxes_within(shape)), data.draw(boxes_within(shape))
    marks = np.zeros(shape, int)
    marks[index(a)] += 1
    marks[index(b)] += 1
    common = a.intersect(b)
    assert (0 if common is None else common.volume) == (marks == 2).sum()
    if common is not None:
        assert (marks[index(common)] == 2).all()


@given(shape=shapes, gap=st.integers(1, 30), limit=st.integers(1, 40), data=st.data())
def test_cutting_loses_nothing_and_keeps_each_part_compact(shape, gap, limit, data):
    box = data.draw(boxes_within(shape))
    flat = np.arange(prod(shape)).reshape(shape)
    seen = np.zeros(shape, int)
    for part in cut(box, strides(shape), gap=gap, limit=limit):
        seen[index(part)] += 1
        wanted = np.sort(flat[index(part)].ravel())
        assert wanted[-1] - wanted[0] + 1 == extent(part.shape, strides(shape))
        assert wanted[-1] - wanted[0] < max(limit, 1)
        assert (np.diff(wanted) <= gap).all()
    expected = np.zeros(shape, int)
    expected[index(box)] = 1
    assert (seen == expected).all()


@given(shape=shapes, data=st.data())
def test_a_cover_is_faultless_exactly_if_every_element_is_held_once(shape, data):
    boxes = data.draw(st.lists(boxes_within(shape), max_size=5))
    counts = np.zeros(shape, int)
    for box in boxes:
        counts[index(box)] += 1
    assert (cover_fault(shape, boxes) is None) == bool((counts == 1).all())


def test_an_empty_tensor_is_covered_by_nothing():
    assert cover_fault((0, 3), []) is None
    assert "0 of 3" in str(cover_fault((3,), []))
