# SPDX-License-Identifier: Apache-2.0
"""Run by test_ranks.py, once a rank: ``ranks_worker.py CASE RANK SIZE DIRECTORY``."""

from __future__ import annotations

import errno
import faulthandler
import os
import re
import sys
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mb_ckpt import CheckpointBusyError, CheckpointError, CheckpointStore
from mb_ckpt.format import local_reader
from mb_ckpt.saving import writing
from mb_config.records import TensorShard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

WIDE = torch.arange(7 * 10, dtype=torch.float32).reshape(7, 10)
FLAT = torch.arange(4 * 9, dtype=torch.int64).reshape(4, 9)


def shard(tensor, key, offset, local, flat=None, *, replica_id=0, fill=None):
    data = tensor[tuple(slice(o, o + n) for o, n in zip(offset, local, strict=True))]
    data = data.reshape(-1)[flat[0] : flat[1]] if flat else data
    data = data.clone(memory_format=torch.contiguous_format)
    return TensorShard(
        key=key, data=data if fill is None else data.fill_(fill), offset=offset, local_shape=local,
        global_shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."),
        replica_id=replica_id, flat_range=flat,
    )  # fmt: skip


def state(rank, *, fill=None):
    """Columns of WIDE, a flat range of FLAT, a replica, and a tensor that only this rank has."""
    columns = [((0, 0), (7, 3)), ((0, 3), (7, 7))][rank]
    flat = [(0, 17), (17, 36)][rank]
    own = torch.full((3,), float(rank)) + 1
    return {
        "model": {"wide": shard(WIDE, "wide", *columns, fill=fill)},
        "flat": [shard(FLAT, "flat", (0, 0), (4, 9), flat, fill=fill)],
        "norm": shard(torch.ones(5), "norm", (0,), (5,), replica_id=rank, fill=fill),
        f"stage{rank}": shard(own, f"stage{rank}.w", (0,), (3,), fill=fill),
        "plain": torch.full((2,), 8.0 if fill is None else float(fill)),
        "n": {"rank": rank, "lr": 0.5},
    }


def raises(kind, text, call):
    with pytest.raises(kind, match=re.escape(text)):
        call()


def check_loaded(rank, loaded):
    assert torch.equal(loaded["model"]["wide"].data, state(rank)["model"]["wide"].data)
    assert torch.equal(loaded["flat"][0].data, state(rank)["flat"][0].data)
    assert loaded["norm"].data.tolist() == [1.0] * 5
    assert loaded[f"stage{rank}"].data.tolist() == [rank + 1.0] * 3
    assert loaded["plain"].tolist() == [8.0] * 2


def save_and_load(rank, root):
    with CheckpointStore(root, keep_last=2) as store:
        for step in (1, 2, 3):
            store.save(step, state(rank))
        room = state(rank, fill=-1)
        assert store.load(room)["n"] == {"rank": 0, "lr": 0.5}
        check_loaded(rank, room)
        other = state(1 - rank, fill=-1)
        store.load(other, 2)
        check_loaded(1 - rank, other)
        store.load({f"stage{rank}": room[f"stage{rank}"]})
        assert store.steps() == [2, 3]


def load_from_one(rank, root):
    with CheckpointStore(root) as store:
        room = state(rank, fill=-1)
        store.load(room)
        check_loaded(rank, room)


def failures(rank, root):
    write = writing.write_array

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CheckpointStore(root) as store:
        store.save(1, state(rank)).result()
        if rank == 1:
            writing.write_array = full
        handle = store.save(2, state(rank))
        raises(CheckpointError, "rank 1: disk full while writing", handle.result)
        writing.write_array = write
        assert store.steps() == [1]
        dist.barrier()
        assert sorted(p.name for p in root.iterdir()) == ["step_00000001"]
        bad = {**state(rank), "bad": print if rank == 1 else 0}
        if rank == 1:
            raises(CheckpointError, "'bad' is a builtin", lambda: store.save(2, bad))
        else:
            handle = store.save(2, bad)
            raises(CheckpointError, "rank 1: state 'bad' is a builtin", handle.result)
        alone = {**state(rank), **({"alone": torch.ones(1)} if rank == 1 else {})}
        handle = store.save(2, alone)
        raises(CheckpointError, "'alone' is on rank 1 but not on rank 0", handle.result)
        handle = store.save(2 + rank, state(rank))
        raises(CheckpointError, "different steps at once, [2, 3]", handle.result)
        twice = {**state(rank), "norm": shard(torch.ones(5), "norm", (0,), (5,))}
        raises(
            CheckpointError, "'norm'[5] cannot be saved: two pieces", store.save(2, twice).result
        )
        other = {**state(rank), "x": shard(torch.ones(2 + rank), "x", (0,), (2 + rank,))}
        raises(
            CheckpointError,
            "'x' is float32[3] on rank 1 but float32[2]",
            store.save(2, other).result,
        )
        dist.barrier()
        assert sorted(p.name for p in root.iterdir()) == ["step_00000001"]
        store.save(4, state(rank)).result()
        room = state(rank, fill=-1)
        store.load(room)
        check_loaded(rank, room)
        assert store.steps() == [1, 4]


def refusal(rank, root):
    """Only rank 1 is slow, and both refuse."""
    go, write = threading.Event(), writing.write_array
    if rank == 1:
        writing.write_array = lambda *a, **k: go.wait(60) and write(*a, **k)
    with CheckpointStore(root, on_busy="refuse") as store:
        first = store.save(1, state(rank))
        second = lambda: store.save(2, state(rank))
        raises(CheckpointBusyError, "step 1 is still being written", second)
        go.set()
        first.result()
        dist.barrier()
        store.save(3, state(rank)).result()
        assert store.steps() == [1, 3]
    raises(CheckpointError, "memory of one process", lambda: CheckpointStore("memory://x"))


def death(rank, root):
    """Ranks 0 and 1 of three save on their own; then rank 1 dies while it saves."""
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    if rank < 2:
        for step in (1, 2):  # one after the other: the second must not meet the first's groups
            with CheckpointStore(root, process_group=pair) as store:
                store.save(step, state(rank)).result()
        store = CheckpointStore(root, process_group=pair, timeout_s=60)
        if rank == 1:
            writing.write_array = lambda *_, **__: os._exit(9)
        handle = store.save(3, state(rank))
        raises(CheckpointError, "rank 0 lost contact with the other ranks", handle.result)
        assert store.steps() == [1, 2]
    else:
        with CheckpointStore(root / "alone", process_group=single) as store:
            store.save(7, {"w": torch.ones(2)}).result()
            assert store.inspect().world_size == 1
    os._exit(0)  # the default group cannot be taken down without rank 1


def replicated(fill=None):
    """Replicas of 100 tensors of 1 KB to 2 MB, and a module with buffers."""
    sizes = [256 * (1 + i * i % 53) * (1 + i % 37) for i in range(100)]
    state = {f"t{i}": torch.full((n,), float(i) if fill is None else fill)
             for i, n in enumerate(sizes)}  # fmt: skip
    large = torch.arange(5_000_000, dtype=torch.float32).reshape(1, 500, 10_000)
    return {**state, "large": large if fill is None else torch.full_like(large, fill)}


def spread(rank, root):
    """Both ranks write half of what both have; a buffer that differs is rank 0's."""
    norm = torch.nn.BatchNorm1d(2000)
    norm.running_mean.fill_(float(rank + 1))
    written = []
    perform = writing.perform
    writing.perform = lambda store, task, data: (
        written.append(task["nbytes"]) or perform(store, task, data)
    )
    with CheckpointStore(root) as store:
        for step in (1, 2):
            store.save(step, {**replicated(), "norm": norm}).result()
        assert written[0] == written[1]
        counts = [None, None]
        dist.all_gather_object(counts, written[0])
        assert abs(counts[0] - counts[1]) < 0.02 * sum(counts), counts
        room = replicated(fill=-1.0)
        store.load({**room, "norm": norm})
        assert all(torch.equal(room[k], v) for k, v in replicated().items())
        assert (norm.running_mean == 1).all()
        tensors = store.inspect().tensors
        assert tensors["large"].pieces == 2
        assert (
            sum(t.nbytes for t in tensors.values())
            <= sum(counts)
            < 22e6 + sum(t.nbytes for key, t in tensors.items() if key.startswith("t"))
        )
    writing.perform = perform


def kinds(rank, root):
    """Every way of writing gives what was saved, from pieces that share chunks, too."""
    ways = [
        {"staging": "lazy"}, {"writer": "process", "staging": "lazy"}, {"layout": "zarr"},
        {"layout": "zarr", "compression": "zstd", "staging": "lazy", "writer": "process"},
        {"replicate_to": root / "second"},
    ]  # fmt: skip
    for i, way in enumerate(ways):
        with CheckpointStore(root / str(i), **way) as store:
            for step in (1, 2):
                live = state(rank)
                handle = store.save(step, live)
                handle.wait_staged()
                live["model"]["wide"].data.zero_()
                handle.result()
                assert handle.replicated() == ("replicate_to" in way)
            for from_rank in (rank, 1 - rank):
                room = state(from_rank, fill=-1)
                store.load(room, 1)
                check_loaded(from_rank, room)
            if rank == 1:
                live["bad"] = print
                raises(CheckpointError, "'bad' is a builtin", partial(store.save, 3, live))
            else:
                handle = store.save(3, live)
                handle.wait_staged()
                raises(CheckpointError, "rank 1: state 'bad' is a builtin", handle.result)
            store.save(4, state(rank)).result()
            assert store.steps() == [1, 2, 4]
            dist.barrier()
    with CheckpointStore(root / "second") as store:
        room = state(rank, fill=-1)
        store.load(room, 2)
        check_loaded(rank, room)


def on_demand(rank, root):
    """Both ranks' rows are read while they are written, in either layout."""
    big = torch.arange(2 * 700 * 900, dtype=torch.float32).reshape(1400, 900)
    mine = big[700 * rank : 700 * (rank + 1)]
    asked = []

    def rows(start, stop):
        asked.append(stop - start)
        return mine[start:stop]

    lazy = TensorShard(
        key="big", data=torch.empty_like(mine, device="meta"), global_shape=(1400, 900),
        offset=(700 * rank, 0), local_shape=(700, 900), dtype="float32", read_rows=rows,
    )  # fmt: skip
    for layout in ("packed", "zarr"):
        asked.clear()
        with CheckpointStore(root / layout, layout=layout) as store:
            store.save(1, {"big": lazy, **state(rank)}).result()
            assert sum(asked) == 700
            other, room = torch.zeros(1400, 900), state(rank, fill=-1)
            store.load({"big": other, **room})
            assert torch.equal(other, big)
            check_loaded(rank, room)
            if rank == 0:
                store.verify()
            dist.barrier()


def past_the_cache(rank, root):
    """What several ranks want goes through the page cache, what one of them has alone does not."""
    flags, real_open = [], os.open

    def watched(path, how, *mode):
        flags.append(how)
        return real_open(path, how, *mode)

    weight = torch.arange(1 << 20, dtype=torch.float32).reshape(1024, 1024)
    mesh = init_device_mesh("cpu", (2,))
    with CheckpointStore(root) as store:
        store.save(1, {"w": weight}).result()
        dist.barrier()
        for placement, expected in ((Replicate(), False), (Shard(0), True)):
            room = distribute_tensor(torch.zeros_like(weight), mesh, [placement])
            flags.clear()
            os.open = watched
            local_reader._is_cached = lambda *_: False
            store.load({"w": room})
            os.open = real_open
            assert any(how & getattr(os, "O_DIRECT", 0) for how in flags) == expected, placement
            assert torch.equal(room.full_tensor(), weight)


def split_anew(rank, root):
    """A DTensor that is split in another way at the next save is stored as it is then."""
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2,))
    whole = torch.arange(36.0).reshape(6, 6)
    ways = [
        (mesh, [Shard(0)]), (other, [Shard(0)]), (mesh, [Shard(1)]), (mesh, [Replicate()]),
        (mesh, [Shard(0)]),
    ]  # fmt: skip
    with CheckpointStore(root) as store:
        for step, (where, placements) in enumerate(ways):
            value = distribute_tensor(whole + step, where, placements)
            for _ in range(2):
                store.save(step, {"w": value}).result()
            room = torch.zeros(6, 6)
            store.load({"w": room}, step)
            assert torch.equal(room, whole + step), step
            assert store.inspect(step).tensors["w"].pieces == (1 if step == 3 else 2)


def sharded_training(seed, mesh):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    if mesh is not None:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def train_sharded(model, optimizer, steps):
    losses = []
    for step in steps:
        x_BI = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        loss = model(x_BI).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fsdp(rank, root):
    """FSDP2 resumes, in one dimension and with replicas, and one rank reads what it saved."""
    for name, mesh in (
        ("shard", init_device_mesh("cpu", (2,))),
        ("replicate", init_device_mesh("cpu", (2, 1), mesh_dim_names=("r", "s"))),
    ):
        model, optimizer = sharded_training(0, mesh)
        train_sharded(model, optimizer, range(3))
        with CheckpointStore(root / name, staging="lazy") as store:
            store.save(3, {"model": model, "optimizer": optimizer}).wait_staged()
            expected = train_sharded(model, optimizer, range(3, 6))
            again, other = sharded_training(1, mesh)
            store.load({"model": again, "optimizer": other})
            moment = other.state[next(again.parameters())]["exp_avg"]
            assert type(moment).__name__ == "DTensor"
            assert train_sharded(again, other, range(3, 6)) == expected
            pieces = store.inspect().tensors["model.0.weight"].pieces
            assert pieces == (2 if name == "shard" else 1)
    dense, optimizer = sharded_training(1, None)
    store = CheckpointStore(root / "shard")
    store.load({"model": dense, "optimizer": optimizer})
    assert train_sharded(dense, optimizer, range(3, 6)) == pytest.approx(expected, rel=1e-5)
    store.close()
    partial_sum = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()])
    with CheckpointStore(root / "partial") as store:
        raises(CheckpointError, "partial sums", partial(store.save, 1, {"w": partial_sum}))


CASES = {
    "fsdp": [fsdp, split_anew],
    "layouts": [save_and_load, refusal],
    "kinds": [spread, kinds, on_demand, past_the_cache],
    "failures": [failures],
    "load": [load_from_one],
    "death": [death],
}


def main():
    name, rank, size, root = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    faulthandler.dump_traceback_later(80, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/{name}.meeting", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    for case in CASES[name]:
        case(rank, root / case.__name__)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
