# SPDX-License-Identifier: Apache-2.0
"""Any tensor, saved in any partition and loaded in any other, equals itself bit for bit."""

from __future__ import annotations

import os
from itertools import pairwise, product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mb_ckpt import CheckpointStore
from mb_ckpt.loading import packed_reader, segments
from mb_config.records import TensorShard

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128,
]  # fmt: skip
shapes = st.lists(st.integers(0, 7), min_size=0, max_size=4).map(tuple)


def bytes_of(tensor):
    """Every element as a row of bytes, by numpy and not by the code under test."""
    flat = tensor.contiguous().reshape(-1)
    if not flat.numel():
        return np.empty((0, flat.element_size()), np.uint8)
    return flat.view(torch.uint8).numpy().reshape(-1, flat.element_size())


def random_bits(shape, dtype, seed):
    """Return a tensor of any bit patterns: nan payloads, infinities and denormals among them."""
    count = prod(shape) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    if dtype == torch.bool:
        raw &= 1
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


@st.composite
def grids(draw, shape):
    """Return boxes that tile *shape*: an uneven grid, then some cells split once more."""
    axes = []
    for n in shape:
        cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))})
        axes.append(list(pairwise(cuts)) or [(0, 0)])
    cells = []
    for cell in product(*axes):
        offset, local = [a for a, _ in cell], [b - a for a, b in cell]
        dims = [d for d, n in enumerate(local) if n > 1]
        if dims and draw(st.booleans()):
            d = draw(st.sampled_from(dims))
            at = draw(st.integers(1, local[d] - 1))
            first, second = list(local), list(local)
            first[d], second[d] = at, local[d] - at
            moved = list(offset)
            moved[d] += at
            cells += [(tuple(offset), tuple(first)), (tuple(moved), tuple(second))]
        else:
            cells.append((tuple(offset), tuple(local)))
    return cells


@st.composite
def partitions(draw, shape):
    """Return ``(offset, local_shape, flat_range)`` pieces that tile *shape*."""
    pieces = []
    for offset, local in draw(grids(shape)):
        if draw(st.booleans()):
            cuts = sorted(
                {0, prod(local), *draw(st.lists(st.integers(0, prod(local)), max_size=2))}
            )
            ranges = list(pairwise(cuts)) or [(0, 0)]
            pieces += [(offset, local, r) for r in ranges]
        else:
            pieces.append((offset, local, None))
    return pieces


def shard(tensor, piece, *, key="w", replica_id=0, garbage=False):
    """Cut *piece* out of a global tensor with plain indexing, or make room for it."""
    offset, local, flat = piece
    data = tensor[tuple(slice(o, o + n) for o, n in zip(offset, local, strict=True))]
    if flat is not None:
        data = data.reshape(-1)[flat[0] : flat[1]]
    data = data.clone(memory_format=torch.contiguous_format)
    if garbage and data.numel():
        data.view(-1).view(torch.uint8).bitwise_not_()
    return TensorShard(
        key=key, data=data, global_shape=tuple(tensor.shape), offset=offset, local_shape=local,
        dtype=str(tensor.dtype).removeprefix("torch."), replica_id=replica_id, flat_range=flat,
    )  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))
def test_what_is_loaded_equals_what_was_saved_in_any_layout(
    data, shape, dtype, seed, monkeypatch, tmp_path
):
    # Small limits, so that these small tensors go through every way of reading.
    small = data.draw(st.sampled_from([16, 64, 1 << 20]))
    monkeypatch.setattr(packed_reader, "INNER_BYTES", small)
    monkeypatch.setattr(packed_reader, "_LEAST_DIRECT", small)
    monkeypatch.setattr(segments, "INNER_BYTES", small)
    monkeypatch.setattr(segments, "READ_BYTES", data.draw(st.sampled_from([32, 256, 16 << 20])))
    tensor, other = random_bits(shape, dtype, seed), random_bits((5, 3), dtype, seed + 1)
    source = data.draw(partitions(shape))
    target = data.draw(partitions(shape))
    saved = [shard(tensor, piece) for piece in source]
    copies = [shard(tensor, piece, replica_id=1, garbage=True) for piece in source]
    how = {"layout": data.draw(st.sampled_from(["packed", "zarr"])),
           "compression": data.draw(st.sampled_from([None, "zstd"]))}  # fmt: skip
    place = data.draw(st.sampled_from([f"memory://reshard-{seed}", tmp_path]))
    with CheckpointStore(place, **how) as store:
        store.save(0, {"a": other, "deep": [{"w": [*saved, *copies]}]})
        wanted = [shard(tensor, piece, garbage=True) for piece in target]
        room = torch.zeros_like(other)
        store.load({"w": wanted, "a": room})
        store._store.remove("step_00000000")
    assert (bytes_of(room) == bytes_of(other)).all()
    for piece, got in zip(target, wanted, strict=True):
        assert (bytes_of(got.data) == bytes_of(shard(tensor, piece).data)).all()


@pytest.mark.parametrize("piece", [
    ((0, 0), (1700, 2000), None),
    ((0, 1000), (1700, 1000), None),
    ((850, 0), (850, 2000), None),
    ((3, 7), (1500, 11), None),
    ((1, 0), (1600, 2000), (123_457, 3_000_001)),
], ids=["whole", "columns", "rows", "few columns", "flat range"])  # fmt: skip
def test_a_tensor_of_many_chunks_and_files_is_cut_right(piece, tmp_path):
    tensor = torch.arange(1700 * 2000 * 3, dtype=torch.int32).reshape(3, 1700, 2000)
    with CheckpointStore(tmp_path) as store:
        halves = [((0, 0, 0), (3, 1700, 900), None), ((0, 0, 900), (3, 1700, 1100), None)]
        store.save(1, {"w": [shard(tensor, half) for half in halves]})
        offset, local, flat = piece
        middle = ((1, *offset), (1, *local), flat)
        wanted = shard(tensor, middle, garbage=True)
        store.load({"w": wanted})
    assert torch.equal(wanted.data, shard(tensor, middle).data)


def test_columns_far_apart_are_read_without_what_lies_between(tmp_path, monkeypatch):
    tensor = torch.arange(8 * (1 << 20), dtype=torch.float32).reshape(8, 1 << 20)
    read = []
    preadv = os.preadv

    def counted(file, buffers, at):
        read.append(sum(map(len, buffers)))
        return preadv(file, buffers, at)

    monkeypatch.setattr(os, "preadv", counted)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"w": tensor})
        piece = ((0, 5), (8, 100), None)
        wanted = shard(tensor, piece, garbage=True)
        store.load({"w": wanted})
    assert torch.equal(wanted.data, tensor[:, 5:105])
    assert sum(read) == 8 * ((1 << 20) + 4096), "a chunk and its checksum of each row"


def test_a_transposed_tensor_is_saved_and_filled_through_its_view(tmp_path):
    tensor = torch.randn(30, 50)
    room = torch.zeros(50, 30)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"w": tensor.t()})
        store.load({"w": room.t().contiguous().t()})
        store.load({"w": room})
    assert torch.equal(room, tensor.t())
    turned = torch.zeros(30, 50)
    with CheckpointStore(tmp_path) as store:
        store.load({"w": turned.t()})
    assert torch.equal(turned, tensor)
