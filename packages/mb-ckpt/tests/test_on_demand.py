# SPDX-License-Identifier: Apache-2.0
"""States whose values are read when they are written."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore
from mb_ckpt.saving import on_demand
from mb_ckpt.saving.on_demand import BytesOnDemand
from mb_ckpt.saving.planning import Plan, Share, make_plan
from mb_ckpt.states.flattening import flatten
from mb_ckpt.states.storable import TensorToRead
from mb_config.records import TensorShard

MB = 1 << 20


def values_of(key, shape, dtype):
    generator = torch.Generator().manual_seed(len(key))
    return torch.randn(shape, generator=generator).to(dtype)


def lazy(key, values, read=None, **place):
    """Return a shard of *values*, whole unless *place* says otherwise, that is read on demand."""
    shape = tuple(values.shape)
    place = {"global_shape": shape, "offset": (0,) * len(shape)} | place
    return TensorShard(
        key=key,
        data=torch.empty_like(values, device="meta"),
        local_shape=shape,
        dtype=str(values.dtype).removeprefix("torch."),
        read_rows=read or (lambda start, stop: values[start:stop]),
        **place,
    )


SHAPES = {
    "rows of three": ((7, 3), torch.float32),
    "no rows": ((0, 4), torch.float32),
    "rows of nothing": ((5, 0), torch.float32),
    "odd bytes": ((11,), torch.int8),
    "experts": ((3, 50, 20), torch.bfloat16),
    "complex": ((9, 2), torch.complex128),
}


@pytest.mark.parametrize("layout", ["packed", "zarr"])
def test_what_is_read_on_demand_is_what_is_loaded(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(on_demand, "BLOCK_BYTES", 100)
    tensors = {key: values_of(key, *kind) for key, kind in SHAPES.items()}
    state = {
        "lazy": [lazy(key, values) for key, values in tensors.items()],
        "here": {"matrix": torch.randn(4, 6).t(), "scalar": torch.tensor(3.5)},
        "plain": {"n": 1},
    }
    with CheckpointStore(tmp_path, layout=layout) as store:
        store.save(0, state).result()
        into = {key: torch.zeros_like(values) for key, values in tensors.items()}
        here = {"matrix": torch.zeros(6, 4), "scalar": torch.tensor(0.0)}
        found = store.load({"here": here, **into})
        store.verify()
    assert found["plain"] == {"n": 1}
    assert all(torch.equal(into[key], values) for key, values in tensors.items())
    assert torch.equal(here["matrix"], state["here"]["matrix"])
    assert here["scalar"] == 3.5


def to_read(values):
    """Return *values* as a tensor that is read when it is written."""
    scalar = not values.dim()
    return TensorToRead(
        dtype=values.dtype,
        shape=tuple(values.shape),
        read_rows=lambda start, stop: values if scalar else values[start:stop],
    )


@pytest.mark.parametrize("layout", ["packed", "zarr"])
def test_tensors_to_read_are_stored_as_plain_tensors_are(layout, tmp_path):
    tensors = {key: values_of(key, *kind) for key, kind in SHAPES.items()}
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.bfloat16)
    lazily = {"model": {key: to_read(values) for key, values in tensors.items()}, "n": 1}
    with CheckpointStore(tmp_path, layout=layout) as store:
        store.save(0, lazily).result()
        store.save(1, {"model": tensors, "n": 1}).result()
        found = store.compare(store, step=0, other_step=1)
    assert found.equal == len(tensors)
    assert not found.differs


def test_two_tensors_to_read_of_one_key_are_refused(tmp_path):
    one = to_read(torch.ones(2))
    with CheckpointStore(tmp_path) as store, pytest.raises(CheckpointError, match=r"a\.b"):
        store.save(0, {"a": {"b": one}, "a.b": one})


def test_every_row_is_read_once_and_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(on_demand, "BLOCK_BYTES", MB)
    wide = values_of("wide", (100, MB // 16), torch.float32)  # 25 MiB: several files of 8 MiB
    asked = []

    def read(start, stop):
        asked.append((start, stop))
        return wide[start:stop]

    with CheckpointStore(tmp_path) as store:
        store.save(0, {"wide": lazy("wide", wide, read)}).result()
        into = torch.zeros_like(wide)
        store.load({"wide": into})
    assert asked == [(i, i + 4) for i in range(0, 100, 4)]
    assert torch.equal(into, wide)


def share_of(state):
    flat = flatten(state)
    plan = make_plan([flat.specs])
    return flat, Share(specs=flat.specs, rank=0, plan=plan)


def test_any_slice_has_the_bytes_of_its_place(monkeypatch):
    monkeypatch.setattr(on_demand, "BLOCK_BYTES", 24)
    a, b = values_of("a", (7, 3), torch.float32), values_of("b", (5,), torch.int8)
    flat, share = share_of({"shards": [lazy("a", a), lazy("b", b)], "c": torch.arange(3)})
    data = BytesOnDemand(share, flat.tensors, flat.readers)
    whole = np.zeros(share.total, np.uint8)
    for part in share.parts:
        values = {"a": a, "b": b, "c": torch.arange(3)}[share.specs[part.index].key]
        raw = values.contiguous().numpy().tobytes()
        whole[part.start : part.start + len(raw)] = np.frombuffer(raw, np.uint8)
    assert len(data) == len(whole) > 84 + 5 + 24
    for start in range(0, len(whole), 5):
        for stop in range(start, len(whole) + 7, 9):
            assert (data[start:stop] == whole[start:stop]).all(), (start, stop)


def test_parts_of_a_piece_that_several_ranks_share_are_read_by_their_rows():
    values = values_of("a", (2048, 2048), torch.float32)  # 16 MiB, split by rows between two ranks
    copies = [flatten({"a": lazy("a", values, replica_id=rank)}) for rank in (0, 1)]
    plan = make_plan([copy.specs for copy in copies])
    found = []
    for rank in (0, 1):
        share = Share(specs=copies[rank].specs, rank=rank, plan=plan)
        data = BytesOnDemand(share, copies[rank].tensors, copies[rank].readers)
        found.append(torch.from_numpy(data[0 : len(data)]).view(torch.float32))
    assert min(map(len, found)) > 0
    assert torch.equal(torch.cat(found), values.flatten())


def test_rows_of_another_dimension_are_cut_out():
    values = values_of("a", (1, 6, 4), torch.float32)
    flat, share = share_of({"a": lazy("a", values)})
    (part,) = share.parts
    cut = type(part)(part.index, 0, part.boxes, (1, 2, 3))
    plan = Plan(shares=[[cut]], totals=[3 * 4 * 4], tensors={})
    data = BytesOnDemand(Share(specs=flat.specs, rank=0, plan=plan), flat.tensors, flat.readers)
    assert data[0:48].tobytes() == values[:, 2:5].numpy().tobytes()


def test_nothing_may_change_before_it_is_written(tmp_path):
    values = torch.ones(4, 2)
    with CheckpointStore(tmp_path) as store:
        handle = store.save(0, {"a": lazy("a", values)})
        handle.wait_staged()
        assert handle.done()


def test_a_failure_to_read_fails_the_save_and_leaves_nothing(tmp_path):
    def fails(start, stop):
        raise OSError(5, "the disk is gone")

    def other(start, stop):
        return torch.zeros(stop - start, 3)

    values = torch.ones(4, 2)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(CheckpointError, match="the disk is gone"):
            store.save(0, {"a": lazy("a", values, fails)}).result()
        with pytest.raises(CheckpointError, match=r"read_rows\(0, 4\) returned .*\[4, 3\], exp"):
            store.save(0, {"a": lazy("a", values, other)}).result()
        assert store.steps() == []
        store.save(0, {"a": lazy("a", values)}).result()
        assert store.steps() == [0]


@pytest.mark.parametrize("how", [{"staging": "lazy"}, {"writer": "process"}])
def test_stores_that_copy_elsewhere_refuse(how, tmp_path):
    with (
        CheckpointStore(tmp_path, **how) as store,
        pytest.raises(CheckpointError, match="needs a store with staging='eager'"),
    ):
        store.save(0, {"a": lazy("a", torch.ones(2, 2))})


def test_data_that_is_here_or_has_no_rows_is_refused(tmp_path):
    here = lazy("a", torch.ones(2, 2))
    scalar = lazy("a", torch.tensor(1.0))
    object.__setattr__(here, "data", torch.ones(2, 2))
    with CheckpointStore(tmp_path) as store:
        for shard in (here, scalar):
            with pytest.raises(CheckpointError, match="must be on meta and have a dimension"):
                store.save(0, {"a": shard})
        store.save(0, {"a": lazy("a", torch.ones(2, 2))}).result()
        with pytest.raises(CheckpointError, match="only dense, unquantised tensors with data"):
            store.load({"a": lazy("a", torch.ones(2, 2))})


MEMORY = """
import sys, torch
from mb_ckpt import CheckpointStore
from mb_config.records import TensorShard

def shards(count, rows):
    shape = (rows, 1 << 18)
    return [
        TensorShard(key=str(i), data=torch.empty(shape, device="meta"), global_shape=shape,
                    offset=(0, 0), local_shape=shape, dtype="float32",
                    read_rows=lambda start, stop: torch.ones(stop - start, 1 << 18))
        for i in range(count)
    ]

def peak():  # ru_maxrss would count what the parent process has held
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

with CheckpointStore(sys.argv[1]) as store:
    store.save(0, {"model": shards(1, 1)}).result()
    before = peak()
    store.save(1, {"model": shards(8, 32)}).result()  # 256 MiB in tensors of 32
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_state(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 160, done.stdout  # MiB; 72 to 127 were measured


def test_a_failure_half_way_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(on_demand, "BLOCK_BYTES", 8 * MB)

    def fails(start, stop):
        if start >= 24:
            raise OSError(5, "the disk is gone")
        return torch.ones(stop - start, MB // 4)

    values = torch.empty(40, MB // 4)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(CheckpointError, match="the disk is gone"):
            store.save(0, {"a": lazy("a", values, fails)}).result()
        assert not [path for path in tmp_path.rglob("*") if "step" in str(path)]
