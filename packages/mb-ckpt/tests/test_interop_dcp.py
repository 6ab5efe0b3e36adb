# SPDX-License-Identifier: Apache-2.0
"""Folders of torch.distributed.checkpoint come in and go out, against DCP itself."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
import subprocess
import sys
import warnings
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from mb_ckpt import (
    CheckpointError,
    CheckpointStore,
    CorruptCheckpointError,
    export_checkpoint,
    import_checkpoint,
)
from mb_ckpt.interop.dcp import open_dcp
from mb_ckpt.interop.peer_folders import resolve
from mb_ckpt.interop.restricted_pickle import read_object, to_state
from mb_ckpt.interop.torch_dist import open_torch_dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.int64,
    torch.uint16, torch.complex64,
]  # fmt: skip


def save(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process is meant
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def load(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def random(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 3
    return (values > 0) if dtype == torch.bool else values.abs().to(dtype)


def state_of(seed=0):
    every = {str(d).removeprefix("torch."): random((5, 3), d, seed) for d in DTYPES}
    return {
        "every": every,
        "scalar": torch.tensor(float(seed)),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "deep": [{"w": random((700, 3), torch.float32, seed)}, random((3,), torch.int64, seed)],
        "n": seed,
        "text": "abc",
        "pair": (1, None),
    }


def same(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.view(torch.uint8) if one.dim() else one, other.view(torch.uint8) if one.dim() else other
    )


def trained():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_what_dcp_saved_is_loaded_from_a_store(tmp_path):
    state = state_of(3)
    save(state, tmp_path / "step_12")
    with CheckpointStore(tmp_path / "store") as store:
        done = import_checkpoint(tmp_path / "step_12", store)
        assert (done.step, done.format, done.left_out) == (12, "dcp", ())
        room = state_of(0)
        plain = store.load(
            {k: room[k] for k in ("every", "scalar", "empty", "deep")}, unexpected="error"
        )
    for name, value in state["every"].items():
        assert same(room["every"][name], value), name
    assert room["scalar"] == 3
    assert torch.equal(room["deep"][0]["w"], state["deep"][0]["w"])
    assert torch.equal(room["deep"][1], state["deep"][1])
    assert (plain["n"], plain["text"], plain["pair"]) == (3, "abc", (1, None))


def test_a_model_and_its_optimizer_move_both_ways(tmp_path):
    model, optimizer = trained()
    save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "dcp")
    again, other = trained()
    for parameter in again.parameters():
        parameter.data.zero_()
    other.state.clear()
    with CheckpointStore(tmp_path / "store") as store:
        import_checkpoint(tmp_path / "dcp", store)
        store.load({"model": again, "optimizer": other})
        assert all(
            torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
        )
        moments = optimizer.state_dict()["state"]
        for i, found in other.state_dict()["state"].items():
            assert all(torch.equal(found[k], moments[i][k]) for k in moments[i])
        store.save(5, {"model": again, "optimizer": other}).result()
        export_checkpoint(store, tmp_path / "out", to="dcp")
    room = {
        "model": {k: torch.zeros_like(v) for k, v in model.state_dict().items()},
        "optimizer": trained()[1].state_dict(),
    }
    for values in room["optimizer"]["state"].values():
        for value in values.values():
            value.zero_()
    load(room, tmp_path / "out")
    assert all(torch.equal(room["model"][k], v) for k, v in model.state_dict().items())
    for i, values in room["optimizer"]["state"].items():
        assert all(torch.equal(v, moments[i][k]) for k, v in values.items())


def test_what_is_exported_is_read_by_dcp(tmp_path):
    state, seen = state_of(5), []
    with CheckpointStore(tmp_path / "store", layout="zarr") as store:
        store.save(7, state).result()
        export_checkpoint(
            store, tmp_path / "out", to="dcp", progress=lambda a, b: seen.append((a, b))
        )
    room = load(state_of(0), tmp_path / "out")
    for name, value in state["every"].items():
        assert same(room["every"][name], value), name
    assert torch.equal(room["deep"][0]["w"], state["deep"][0]["w"])
    assert (room["n"], room["text"], room["pair"]) == (5, "abc", (1, None))
    total = sum(
        t.nbytes
        for t in (
            *state["every"].values(),
            state["scalar"],
            *state["deep"][0].values(),
            state["deep"][1],
        )
    )
    assert seen[-1] == (total, total)
    dcp_to_torch_save(tmp_path / "out", tmp_path / "out.pt")
    whole = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(whole["deep"][1], state["deep"][1])


def test_pieces_of_several_ranks_are_put_together(tmp_path):
    """Rows, columns and a grid, as DTensors of several ranks are stored."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
    )  # fmt: skip
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    whole = torch.arange(40 * 6, dtype=torch.float32).reshape(40, 6)
    grids = {"rows": [(13, 6), (27, 6)], "columns": [(40, 2), (40, 4)], "grid": None}
    boxes = {
        "rows": [((0, 0), (13, 6)), ((13, 0), (27, 6))],
        "columns": [((0, 0), (40, 2)), ((0, 2), (40, 4))],
        "grid": [((r, c), (20, 3)) for r in (0, 20) for c in (0, 3)],
    }
    assert boxes.keys() == grids.keys()

    class Planner(dcp.DefaultSavePlanner):
        def create_local_plan(self):
            items = [
                WriteItem(
                    index=MetadataIndex(key, torch.Size(o)), type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(o), torch.Size(n)),
                        properties=TensorProperties(dtype=torch.float32), size=whole.size(),
                    ),
                )
                for key, parts in boxes.items() for o, n in parts
            ]  # fmt: skip
            self.plan = dcp.SavePlan(items)
            return self.plan

        def resolve_data(self, item):
            (r, c), (h, w) = item.index.offset, item.tensor_data.chunk.sizes
            return whole[r : r + h, c : c + w].contiguous()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"),
            planner=Planner(flatten_state_dict=False),
            no_dist=True,
        )
    incoming = open_dcp(tmp_path / "dcp")
    for key in boxes:
        tensor = incoming.state[key]
        rows = [tensor.read_rows(a, b) for a, b in ((0, 5), (5, 14), (14, 33), (33, 40))]
        assert torch.equal(torch.cat(rows), whole), key
    with CheckpointStore(tmp_path / "store") as store:
        import_checkpoint(tmp_path / "dcp", store)
        room = {key: torch.zeros(40, 6) for key in boxes}
        store.load(room)
    assert all(torch.equal(v, whole) for v in room.values())


class Phase(enum.Enum):
    SFT = "sft"


class Other:
    def __init__(self):
        self.x = 1


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_objects_of_others_are_taken_without_running_them(tmp_path):
    sprung = tmp_path / "sprung"
    value = {
        "args": argparse.Namespace(lr=0.1, dtype=torch.bfloat16, phase=Phase.SFT, sizes=(1, 2)),
        "array": np.arange(3, dtype=np.uint32),
        "scalar": np.float64(2.5),
        "other": Other(),
        "trap": Trap(sprung),
        "device": torch.device("cpu"),
        "tensor": torch.ones(2),
        "range": {"set": {1}, "complex": 1j},
    }
    torch.save(value, tmp_path / "common.pt")
    left_out = []
    found = read_object(tmp_path / "common.pt", "it", allow_pickle=False)
    state = to_state(found, "", left_out, allow_pickle=False)
    assert not sprung.exists()
    assert state["args"].pop("phase") in {"sft", "SFT"}, "as the Python that wrote it has it"
    assert state["args"] == {"lr": 0.1, "dtype": "torch.bfloat16", "sizes": (1, 2)}
    assert state["array"].tolist() == [0, 1, 2]
    assert state["array"].dtype == np.uint32
    assert (state["scalar"], state["device"]) == (2.5, "cpu")
    assert torch.equal(state["tensor"], torch.ones(2))
    assert left_out == [
        f"other: it is a {__name__}.Other", "trap: it is a posix.mkdir",
        "range.set: it is a builtins.set", "range.complex: it is a builtins.complex",
    ]  # fmt: skip
    read_object(tmp_path / "common.pt", "it", allow_pickle=True)
    assert sprung.is_dir()


class ByName:
    """Pickles as Python 3.11.2 does a member of an enum, and as an attack on ``getattr`` would."""

    def __init__(self, owner, name):
        self.call = owner, name

    def __reduce__(self):
        return getattr, self.call


def test_members_of_enums_are_found_by_name_and_nothing_else_is(tmp_path):
    from torch.distributed.checkpoint.planner import WriteItemType

    value = {
        "ours": ByName(WriteItemType, "SHARD"), "theirs": ByName(Phase, "SFT"),
        "attack": ByName(dict, "fromkeys"), "deep": ByName(Phase, "__class__"),
    }  # fmt: skip
    torch.save(value, tmp_path / "it.pt")
    found = read_object(tmp_path / "it.pt", "it", allow_pickle=False)
    assert found["ours"] is WriteItemType.SHARD
    assert found["theirs"].arguments == ("SFT",)
    assert found["deep"].arguments == ("__class__",)
    assert type(found["attack"]).__name__ == "getattr"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "OrderedDict"),
    ],
)
@pytest.mark.parametrize("slots", [True, False])
def test_no_pickle_changes_a_class_or_a_function(tmp_path, module, name, slots):
    """By the opcode that gives objects their state."""
    state = b"N}X\x04\x00\x00\x00evilK\x01s\x86" if slots else b"}X\x04\x00\x00\x00evilK\x01s"
    text = b"\x80\x02c" + f"{module}\n{name}\n".encode() + state + b"b."
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(CheckpointError, match="it would change a"):
        open_dcp(tmp_path)
    owner = resolve_name(f"{module}:{name}")
    assert not hasattr(owner, "evil")


@pytest.mark.parametrize("call", [(os.mkdir, "{}"), (eval, "__import__('os').mkdir({!r})")])
def test_a_trap_in_the_metadata_or_an_entry_is_not_sprung(tmp_path, call):
    function, text = call
    sprung = tmp_path / "sprung"

    class Calls:
        def __reduce__(self):
            return function, (text.format(str(sprung)),)

    save({"w": torch.ones(2), "n": {"x": Calls()}}, tmp_path / "entry")
    with CheckpointStore(tmp_path / "store") as store:
        done = import_checkpoint(tmp_path / "entry", store)
        room = torch.zeros(2)
        store.load({"w": room})
    assert torch.equal(room, torch.ones(2))
    assert not sprung.exists()
    assert done.tensors == 1
    metadata = tmp_path / "entry" / ".metadata"
    metadata.write_bytes(pickle.dumps(Calls()))
    with pytest.raises(CheckpointError, match=r"\.metadata holds a .*expected the metadata"):
        open_dcp(tmp_path / "entry")
    broken = Metadata({}, storage_meta=Calls())
    metadata.write_bytes(pickle.dumps(broken))
    with pytest.raises(CheckpointError, match="does not say where its data are"):
        open_dcp(tmp_path / "entry")
    assert not sprung.exists()


def test_pickles_are_taken_over_where_they_are_allowed(tmp_path):
    save({"w": torch.ones(2), "phase": {"x": Phase.SFT}}, tmp_path / "dcp")
    with CheckpointStore(tmp_path / "store", allow_pickle=True) as store:
        import_checkpoint(tmp_path / "dcp", store, allow_pickle=True)
        assert store.load({"w": torch.zeros(2)}) == {"phase": {"x": Phase.SFT}}
        with pytest.raises(CheckpointError, match="pickle"):
            export_checkpoint(store, tmp_path / "out", to="torch_dist")


@pytest.mark.parametrize("damage", ["gone", "cut", "noise", "no metadata", "cut metadata"])
def test_damage_is_named(tmp_path, damage):
    save({"w": torch.randn(300, 300)}, tmp_path / "dcp")
    (data,) = (tmp_path / "dcp").glob("*.distcp")
    metadata = tmp_path / "dcp" / ".metadata"
    if damage == "gone":
        data.unlink()
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:1000])
    elif damage == "noise":
        data.write_bytes(bytes(data.stat().st_size))
    elif damage == "cut metadata":
        metadata.write_bytes(metadata.read_bytes()[:-30])
    else:
        metadata.unlink()
    named = "metadata" if "metadata" in damage else data.name
    with CheckpointStore(tmp_path / "store") as store:
        with pytest.raises(CheckpointError, match=named):
            import_checkpoint(tmp_path / "dcp", store, format="dcp")
        assert store.steps() == []


def test_damage_of_a_step_and_a_full_disk_leave_no_folder(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path / "store") as store:
        store.save(1, {"w": torch.randn(100), "n": 1}).result()
        fsync = os.fsync

        def full(file):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="disk full while writing"):
            export_checkpoint(store, tmp_path / "out", to="dcp")
        monkeypatch.setattr(os, "fsync", fsync)
        (path,) = (tmp_path / "store").glob("step_*/data-*/rank_00000/c/0")
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CorruptCheckpointError, match="'w'"):
            export_checkpoint(store, tmp_path / "out", to="dcp")
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


MEMORY = """
import sys, torch
from pathlib import Path
from mb_ckpt import CheckpointStore, import_checkpoint, export_checkpoint
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
def reset():
    open("/proc/self/clear_refs", "w").write("5")
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) << 10
root = Path(sys.argv[1])
with CheckpointStore(root / "warm") as store:
    import_checkpoint(root / "small", store)
    export_checkpoint(store, root / "small_out", to="dcp")
before = reset()
with CheckpointStore(root / "store") as store:
    import_checkpoint(root / "dcp", store)
    first = peak() - before
    before = reset()
    export_checkpoint(store, root / "out", to="dcp")
print(first >> 20, peak() - before >> 20)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")  # noqa: PTH110
def test_memory_is_that_of_the_largest_tensor(tmp_path):
    largest = 32 << 20
    save({f"t{i}": torch.randn(largest // 4 // 1024, 1024) for i in range(8)}, tmp_path / "dcp")
    save({"t": torch.randn(100)}, tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, tmp_path], capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [int(word) for word in done.stdout.split()]
    assert all(mb < (2 * largest >> 20) + 64 for mb in found), found


def megatron_run(root, steps, tracker):
    for step in steps:
        folder = root / f"iter_{step:07d}"
        save({"w": torch.full((3,), float(step))}, folder)
        torch.save({"iteration": step, "args": argparse.Namespace(lr=1)}, folder / "common.pt")
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        torch.save(
            {"step": torch.tensor(step), "consumed_train_samples": 8}, folder / "train_state.pt"
        )
        (folder / "run_config.yaml").write_text(
            "model:\n  _target_: a.b.Model\n  num_layers: 2\n  act: !!python/name:torch.nn.GELU ''\n"
        )
    (root / "latest_checkpointed_iteration.txt").write_text(tracker)


@pytest.mark.parametrize(
    ("tracker", "asked", "expected"), [("20", None, 20), ("20", 10, 10), ("30", None, 20)]
)
def test_a_run_of_the_peer_is_followed_to_a_checkpoint(tmp_path, tracker, asked, expected):
    megatron_run(tmp_path / "run", [10, 20], tracker)
    (tmp_path / "run" / "iter_0000030").mkdir()
    with CheckpointStore(tmp_path / "store") as store:
        done = import_checkpoint(tmp_path / "run", store, source_step=asked)
        room = torch.zeros(3)
        plain = store.load({"w": room})
    assert (done.step, done.format) == (expected, "torch_dist")
    assert room.tolist() == [expected] * 3
    assert plain["run_config"] == {"model": {"_target_": "a.b.Model", "num_layers": 2, "act": ""}}
    assert plain["train_state"]["consumed_train_samples"] == 8
    assert plain["args"] == {"lr": 1}


def test_a_run_without_the_step_says_which_there_are(tmp_path):
    megatron_run(tmp_path, [10, 20], "20")
    with pytest.raises(CheckpointError, match=r"step 15 is not in .*there is 10, 20"):
        resolve(tmp_path, 15)
    with pytest.raises(CheckpointError, match="is one checkpoint"):
        resolve(tmp_path / "iter_0000010", 20)
    assert resolve(tmp_path / "iter_0000010", None)[1] == 10
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        resolve(tmp_path / "empty", None)


def test_nemo_keeps_weights_in_a_folder_of_their_own(tmp_path):
    save({"w": torch.ones(2)}, tmp_path / "run--val_loss=1.2-step=40-last" / "weights")
    folder, step, _ = resolve(tmp_path, None)
    assert (folder.name, step) == ("weights", 40)


def test_flattened_tensors_get_their_shape_back(tmp_path):
    """As megatron-core once stored what a distributed optimizer had flattened: piece by piece."""
    whole = torch.arange(4 * 6 * 2.0).reshape(4, 6, 2)
    grid = (2, 3, 1)
    pieces = [
        whole[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1) for i in range(2) for j in range(3)
    ]
    stored = torch.stack(pieces).reshape(*grid, -1)
    save({"m": stored}, tmp_path)
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(tmp_path).read_metadata()
    metadata.mcore_data = {"m": {"nd_reformulated_orig_global_shape": (4, 6, 2)}}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    tensor = open_torch_dist(tmp_path).state["m"]
    assert tensor.shape == (4, 6, 2)
    assert torch.equal(torch.cat([tensor.read_rows(0, 1), tensor.read_rows(1, 4)]), whole)


def test_objects_in_memory_files_are_kept_as_such(tmp_path):
    with CheckpointStore(tmp_path / "store") as store:
        from mb_ckpt.states.megatron import decode_object, encode_object

        key = "rng/shard_0.1_2.2"
        store.save(3, {key: encode_object(io.BytesIO(b"abc"), key), "w": torch.ones(1)}).result()
        export_checkpoint(store, tmp_path / "out", to="torch_dist")
        import_checkpoint(tmp_path / "out", store, step=4)
        room = torch.zeros(store.inspect(4).tensors[key].shape, dtype=torch.uint8)
        store.load({key: room}, 4)
    assert decode_object(room).getvalue() == b"abc"
