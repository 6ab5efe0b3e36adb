# SPDX-License-Identifier: Apache-2.0
"""Steps to safetensors and back, beside the library of that format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path, PurePosixPath

import boto3
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mb_ckpt import (
    CheckpointError,
    CheckpointStore,
    CorruptCheckpointError,
    export_checkpoint,
    import_checkpoint,
)
from mb_ckpt.format import zarr_arrays
from mb_ckpt.interop import exporting, importing, stored_rows
from mb_ckpt.interop import safetensors_writer as writer
from mb_config.records import TensorShard
from moto.server import ThreadedMotoServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64",
    "uint32", "uint16", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
MB = 1 << 20


def random_bits(shape, dtype, seed=0):
    """Return a tensor of any bit patterns, NaNs among them."""
    kind = getattr(torch, dtype)
    room = torch.empty(shape, dtype=kind)
    generator = torch.Generator().manual_seed(seed)
    high = 2 if kind == torch.bool else 256
    raw = torch.randint(0, high, (room.nbytes,), generator=generator, dtype=torch.uint8)
    return raw.view(kind).reshape(shape)


def same(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


def all_same(found, expected):
    return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)


def stored(store, step=None):
    """Return all tensors of a step by key."""
    info = store.inspect(step)
    rooms = {
        key: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for key, t in info.tensors.items()
    }
    store.load(rooms, info.step)
    return rooms


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def every_dtype():
    tensors = {dtype: random_bits((5, 3), dtype, i) for i, dtype in enumerate(DTYPES)}
    return tensors | {
        "scalar": random_bits((), "bfloat16"),
        "empty": torch.zeros(0, 4),
        "rows of nothing": torch.zeros(3, 0, dtype=torch.int8),
        "deep": random_bits((2, 3, 4, 5), "float16"),
    }


# Against the library


@pytest.mark.parametrize("layout", ["packed", "zarr"])
def test_what_the_library_saves_is_what_is_stored(tmp_path, layout):
    tensors = every_dtype()
    save_file(tensors, tmp_path / "any.safetensors", metadata={"format": "pt", "note": "x"})
    with CheckpointStore(tmp_path / "run", layout=layout) as store:
        done = import_checkpoint(tmp_path / "any.safetensors", store)
        assert all_same(stored(store), tensors)
        assert store.verify().tensors == len(tensors)
        assert store.inspect().plain == {"__metadata__": {"format": "pt", "note": "x"}}
        assert store.inspect().layout == layout
    assert (done.step, done.format, done.tensors, done.left_out) == (
        0, "safetensors", len(tensors), (),
    )  # fmt: skip
    assert done.nbytes == sum(t.nbytes for t in tensors.values())
    assert done.path == f"{tmp_path}/run/step_00000000"


@pytest.mark.parametrize("layout", ["packed", "zarr"])
@pytest.mark.parametrize("size", [None, 40])
def test_what_is_exported_is_what_the_library_loads(tmp_path, layout, size):
    tensors = every_dtype()
    with CheckpointStore(tmp_path / "run", layout=layout) as store:
        store.save(30, {"model": tensors, "lr": 0.5}).result()
        done = export_checkpoint(store, tmp_path / "out", to="safetensors", max_shard_size=size)
    folder = tmp_path / "out"
    files = sorted(folder.glob("*.safetensors"))
    found = {key: t for file in files for key, t in load_file(file).items()}
    assert all_same(found, {f"model.{key}": t for key, t in tensors.items()})
    nbytes = sum(t.nbytes for t in tensors.values())
    assert (done.step, done.tensors, done.nbytes) == (30, len(tensors), nbytes)
    assert done.path == str(folder)
    if size is None:
        assert files_of(folder) == ["mb_ckpt_plain.json", "model.safetensors"]
        return
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"total_size": nbytes}
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            keys = list(opened.keys())
        assert {index["weight_map"][key] for key in keys} == {file.name}
        held = [found[key].nbytes for key in keys]
        assert sum(held) <= size or len([n for n in held if n]) == 1


def test_values_of_wide_dtypes_begin_at_multiples_of_their_width(tmp_path):
    state = {"a": random_bits((3,), "int8"), "b": random_bits((5,), "float64")}
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, state).result()
        export_checkpoint(store, tmp_path / "out", to="safetensors")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header["b"] == {"dtype": "F64", "shape": [5], "data_offsets": [0, 40]}
    assert raw[8 + length :][:40] == state["b"].numpy().tobytes()


# There and back

STATE = {
    "model": {"layers": [{"w": torch.arange(6.0).reshape(2, 3)}, {"w": torch.ones(2)}]},
    "optimizer": {"state": {0: {"m": torch.ones(3), "step": torch.tensor(4)}}, "lr": 0.1},
    "rng": (b"\x00\xff", float("nan"), None, (1, 2)),
    "empty": {},
    "pair": (torch.zeros(2), torch.ones(1)),
}


@pytest.mark.parametrize("size", ["5GB", 20])
def test_the_state_comes_back_with_its_step_and_places(tmp_path, size):
    with CheckpointStore(tmp_path / "a") as a, CheckpointStore(tmp_path / "b") as b:
        a.save(12, STATE).result()
        export_checkpoint(a, tmp_path / "out", to="safetensors", max_shard_size=size)
        assert import_checkpoint(tmp_path / "out", b).step == 12
        found = a.compare(b)
        assert found.equal == len(a.inspect().tensors)
        assert not found.differs
        optimizer = _Holder()
        b.load({"optimizer": optimizer})
    assert optimizer.state["lr"] == 0.1
    assert optimizer.state["state"][0]["step"] == 4


class _Holder:
    """An object that is filled through ``load_state_dict``."""

    state = None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=3),
        st.binary(max_size=3),
        st.builds(
            random_bits,
            st.lists(st.integers(0, 3), max_size=3).map(tuple),
            st.sampled_from(DTYPES),
            st.integers(0, 9),
        ),
    ),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", "$c", "é", 1, 2]), inner, max_size=3),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    state=st.dictionaries(st.sampled_from(["m", "n", "o.p"]), VALUES, max_size=3),
    size=st.sampled_from([1, 30, "1KB"]),
    layouts=st.tuples(*[st.sampled_from(["packed", "zarr"])] * 2),
    block=st.sampled_from([1, 16, 16 * MB]),
)
def test_any_state_comes_back(tmp_path_factory, state, size, layouts, block):
    folder = tmp_path_factory.mktemp("any") / "out"
    with (
        pytest.MonkeyPatch.context() as patch,
        CheckpointStore("memory://from", layout=layouts[0]) as a,
        CheckpointStore("memory://to", layout=layouts[1]) as b,
    ):
        patch.setattr(writer, "BLOCK_BYTES", block)
        patch.setattr(stored_rows, "_SMALL", block)
        a.save(3, state).result()
        export_checkpoint(a, folder, to="safetensors", max_shard_size=size)
        import_checkpoint(folder, b, replace=True)
        assert not a.compare(b).differs


@pytest.mark.dist
def test_what_two_ranks_wrote_is_one_file(tmp_path):
    worker = Path(__file__).with_name("ranks_worker.py")
    command = [sys.executable, worker, "layouts"]
    ranks = [subprocess.Popen([*command, str(rank), "2", tmp_path]) for rank in (0, 1)]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    with CheckpointStore(tmp_path / "save_and_load") as store, CheckpointStore("memory://one") as b:
        export_checkpoint(store, tmp_path / "out", to="safetensors")
        import_checkpoint(tmp_path / "out", b)
        assert not store.compare(b).differs
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["wide"], torch.arange(70.0).reshape(7, 10))
    assert torch.equal(found["flat"], torch.arange(36).reshape(4, 9))
    assert found["stage1.w"].tolist() == [2.0] * 3


@pytest.mark.parametrize("layout", ["packed", "zarr"])
@pytest.mark.parametrize("block", [24, 64, 130, 1000])
def test_shards_in_columns_are_put_together_by_rows(tmp_path, monkeypatch, layout, block):
    monkeypatch.setattr(writer, "BLOCK_BYTES", block)
    monkeypatch.setattr(stored_rows, "_SMALL", 0)
    monkeypatch.setattr(zarr_arrays, "CHUNK_BYTES", 70)
    read = []
    for name in ("fill", "fill_arrays"):
        monkeypatch.setattr(stored_rows, name, counted(getattr(stored_rows, name), read))
    whole = random_bits((19, 6), "float32")
    pieces = [
        TensorShard(
            key="w", data=whole[:, low:high].contiguous(), global_shape=(19, 6), offset=(0, low),
            local_shape=(19, high - low), dtype="float32",
        )
        for low, high in ((0, 2), (2, 6))
    ]  # fmt: skip
    with CheckpointStore(tmp_path / "run", layout=layout) as store:
        store.save(1, {"model": pieces, "n": 1}).result()
        rows = (store.find()[1].tensors["w"].chunk_shape or [1])[0]
        assert rows == (1 if layout == "packed" else 2)
        export_checkpoint(store, tmp_path / "out", to="safetensors")
    assert all_same(load_file(tmp_path / "out" / "model.safetensors"), {"w": whole})
    assert [start for start, _ in read] == [0, *(stop for _, stop in read[:-1])]  # each row once
    assert all(start % rows == 0 for start, _ in read)  # and each chunk
    assert read[-1][1] == 19


def counted(fill, read):
    """Return *fill*, which notes the rows of what it is to fill."""

    def filling(store, manifest, pieces):
        for piece in pieces:
            (box,) = piece.spec.boxes
            read.append((box.offset[0], box.offset[0] + box.shape[0]))
        fill(store, manifest, pieces)

    return filling


def test_steps_in_an_object_store_go_out_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="bucket")
        tensors = every_dtype()
        with CheckpointStore(f"s3://bucket/run?endpoint={url}") as store:
            store.save(4, tensors).result()
            export_checkpoint(store, tmp_path / "out", to="safetensors")
            assert all_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
            import_checkpoint(tmp_path / "out", store, step=5)
            assert not store.compare(store, step=4, other_step=5).differs
    finally:
        server.stop()


# Names


def test_names_are_chosen_and_changed_on_the_way_out_and_in(tmp_path):
    tensors = {"a.w": torch.ones(2), "a.b": torch.zeros(2), "c": torch.ones(1)}
    with CheckpointStore(tmp_path / "run") as store:
        opt = {"m": torch.ones(3), "lr": 0.1}
        store.save(1, {"model": tensors | {"n": 2}, "opt": opt, "epoch": 3}).result()
        export_checkpoint(
            store, tmp_path / "out", to="safetensors", prefix="model.", strip_prefix="model.",
            rename={"a.": "layers.0."},
        )  # fmt: skip
        plain = json.loads((tmp_path / "out" / "mb_ckpt_plain.json").read_bytes())
        assert plain["tree"] == {
            "n": 2, **{key: {"$tensor": key} for key in ("c", "layers.0.w", "layers.0.b")},
        }  # fmt: skip
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert all_same(
            found, {"layers.0.w": torch.ones(2), "layers.0.b": torch.zeros(2), "c": torch.ones(1)}
        )
        import_checkpoint(
            tmp_path / "out", store, step=2, rename={"layers.0.": "a."}, add_prefix="model."
        )
        assert all_same(stored(store, 2), {f"model.{key}": t for key, t in tensors.items()})
        import_checkpoint(tmp_path / "out", store, step=3, prefix="layers.0.w")
        assert list(store.inspect(3).tensors) == ["layers.0.w"]


def test_what_is_renamed_keeps_its_place_in_the_state(tmp_path):
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, STATE).result()
        export_checkpoint(
            store, tmp_path / "out", to="safetensors", prefix="optimizer.",
            rename={"optimizer.": "opt."},
        )  # fmt: skip
        import_checkpoint(tmp_path / "out", store, step=2)
        assert store.inspect(2).plain == {"opt": {"state": {0: {}}, "lr": 0.1}}
        optimizer = _Holder()
        store.load({"opt": optimizer}, 2)
    assert optimizer.state["state"][0]["m"].tolist() == [1, 1, 1]


def test_a_model_is_imported_under_a_prefix_and_loaded(tmp_path):
    model = torch.nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "m.safetensors", metadata={"format": "pt"})
    other = torch.nn.Linear(3, 2)
    with CheckpointStore("memory://model") as store:
        import_checkpoint(tmp_path / "m.safetensors", store, add_prefix="model.")
        store.load({"model": other})
    assert torch.equal(model.weight, other.weight)


def test_a_committed_step_is_replaced_only_if_asked(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    with CheckpointStore(tmp_path / "run") as store:
        store.save(5, {"w": torch.zeros(2)}).result()
        with pytest.raises(CheckpointError, match=r"step 5 is in .* already: give another step="):
            import_checkpoint(tmp_path / "m.safetensors", store, step=5)
        assert stored(store)["w"].tolist() == [0, 0]
        import_checkpoint(tmp_path / "m.safetensors", store, step=5, replace=True)
        assert stored(store)["w"].tolist() == [1, 1]


def test_progress_ends_with_all_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", 100)
    seen, back = [], []
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, {"w": torch.ones(40, 5), "s": torch.tensor(1.0)}).result()
        export_checkpoint(
            store, tmp_path / "out", to="safetensors", progress=lambda *at: seen.append(at)
        )
        import_checkpoint(tmp_path / "out", store, step=2, progress=lambda *at: back.append(at))
    assert seen[0] == (100, 804)
    assert seen == sorted(seen)
    assert seen[-1] == back[-1] == (804, 804)
    assert back[:2] == [(4, 804), (804, 804)]


# What is refused


def export(store, folder, **options):
    return export_checkpoint(store, folder, to="safetensors", **options)


@pytest.mark.parametrize("layout", ["packed", "zarr"])
def test_damage_is_found_and_nothing_is_left(tmp_path, layout):
    run = tmp_path / "run"
    with CheckpointStore(run, layout=layout) as store:
        store.save(1, {"a": torch.ones(10), "w": random_bits((3, MB), "uint8")}).result()
        pattern = "data-*/rank_00000/c/0" if layout == "packed" else "data-*/w/c/*/*"
        path = max((run / "step_00000001").glob(pattern), key=lambda p: p.stat().st_size)
        raw = bytearray(path.read_bytes())
        raw[2 * MB] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CorruptCheckpointError, match="is corrupt, it holds tensor 'w'"):
            export(store, tmp_path / "out")
    assert files_of(tmp_path) == ["run"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, {"a": torch.ones(10), "b": torch.ones(10)}).result()
        seen = []

        def full(done, total):
            seen.extend(p.name for p in tmp_path.iterdir())
            raise OSError(28, "No space left on device")

        with pytest.raises(CheckpointError, match=r"disk full while writing .*out: free space"):
            export(store, tmp_path / "out", progress=full)
        assert any(name.startswith(".out.incomplete-") for name in seen)
        assert "out" not in seen

        def interrupted(done, total):
            raise KeyboardInterrupt

        (tmp_path / "out").mkdir()
        with pytest.raises(KeyboardInterrupt):
            export(store, tmp_path / "out", progress=interrupted)
        assert files_of(tmp_path) == ["out", "run"]
        assert not files_of(tmp_path / "out")
        export(store, tmp_path / "out")  # an empty folder is no obstacle
        with pytest.raises(CheckpointError, match="out is there and no empty folder"):
            export(store, tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"m\.safetensors: give the name of a folder"):
            export(store, tmp_path / "m.safetensors")
        with pytest.raises(CheckpointError, match="no step 9 in"):
            export(store, tmp_path / "other", step=9)


def test_what_safetensors_cannot_hold_is_refused_by_name(tmp_path):
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, {"a": torch.ones(2), "z": torch.ones(2, dtype=torch.complex128)}).result()
        with pytest.raises(CheckpointError, match="'z' is complex128, which safetensors cannot"):
            export(store, tmp_path / "out")
        export(store, tmp_path / "out", prefix="a")
        store.save(2, {"__metadata__": torch.ones(2)}).result()
        with pytest.raises(CheckpointError, match="'__metadata__' has a name that safetensors"):
            export(store, tmp_path / "other")
        for size in ("5 apples", 0, -3, "0.1"):
            with pytest.raises(CheckpointError, match="expected a size such as '5GB'"):
                export(store, tmp_path / "other", step=1, prefix="a", max_shard_size=size)
        with pytest.raises(
            CheckpointError, match="max_shard_size=10 is of safetensors, not of dcp"
        ):
            export_checkpoint(store, tmp_path / "other", to="dcp", max_shard_size=10)
        with pytest.raises(CheckpointError, match="to='zip': expected 'safetensors', 'dcp', 'tor"):
            export_checkpoint(store, tmp_path / "other", to="zip")


def test_a_header_that_readers_refuse_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_HEADER_BYTES", 120)
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, {"a": torch.ones(2), "b": torch.ones(2)}).result()
        with pytest.raises(
            CheckpointError, match=r"would have 1.. bytes, .* smaller max_shard_size"
        ):
            export(store, tmp_path / "out")
        export(store, tmp_path / "out", max_shard_size=8)


def test_sizes_are_decimal_unless_they_say_otherwise():
    sizes = {"5GB": 5 * 10**9, "512 MiB": 512 * MB, "1.5kb": 1500, "7": 7, "2T": 2 * 10**12}
    assert {text: writer.size_in_bytes(text) for text in sizes} == sizes


@pytest.fixture
def sharded(tmp_path):
    """Two files and their index, as Hugging Face writes them."""
    folder = tmp_path / "hf"
    folder.mkdir()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / names[0])
    save_file({"c": torch.ones(4)}, folder / names[1])
    weights = {"a": names[0], "b": names[0], "c": names[1]}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 36}, "weight_map": weights})
    )
    return folder


def load(folder, **options):
    with CheckpointStore("memory://shards") as store:
        done = import_checkpoint(folder, store, replace=True, **options)
        return done, stored(store)


def test_shards_are_read_by_their_index(sharded):
    save_file({"old": torch.ones(1)}, sharded / "consolidated.safetensors")
    done, found = load(sharded)
    assert all_same(found, {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(4)})
    (line,) = done.left_out
    assert line.startswith("consolidated.safetensors: not one of the files of model-00001-of-00002")


def test_shards_are_read_without_an_index_if_all_are_there(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert load(sharded)[1].keys() == {"a", "b", "c"}
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has 1 of 2 files model-\.\.\.: fetch the others"):
        load(sharded)


def edit(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_does_not_agree_is_refused(sharded):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = (sharded / "model.safetensors.index.json").read_bytes()
    edit(sharded, lambda weights: weights.update(d=names[1]))
    with pytest.raises(CheckpointError, match=rf"'d' is not in .*{names[1]}, where the index says"):
        load(sharded)
    edit(sharded, lambda weights: weights.update(d="../secret.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"'d' in '\.\./secret\.safetensors': expected a file bes"
    ):
        load(sharded)
    (sharded / "model.safetensors.index.json").write_bytes(index)
    edit(sharded, lambda weights: weights.pop("b"))
    done, found = load(sharded)
    assert found.keys() == {"a", "c"}
    assert done.left_out == (f"b: in {names[0]}, but the index does not name it",)
    edit(sharded, lambda weights: weights.update(b=names[1]))
    with pytest.raises(
        CheckpointError, match=rf"'b' is in .*{names[0]}, but the index says {names[1]}"
    ):
        load(sharded)
    twice = b'{"weight_map": {"a": "%s", "a": "%s"}}' % tuple(name.encode() for name in names)
    (sharded / "model.safetensors.index.json").write_bytes(twice)
    with pytest.raises(CheckpointError, match=f"names 'a' twice, in {names[0]} and {names[1]}"):
        load(sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected JSON with 'weight_map'"):
        load(sharded)


def test_files_that_are_missing_short_or_double_are_refused(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))
    raw = second.read_bytes()
    second.write_bytes(raw[:-3])
    with pytest.raises(CheckpointError, match=rf"{second.name} is no whole safetensors file"):
        load(sharded)
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"{second.name} is missing, and model.safeten"):
        load(sharded)
    save_file({"a": torch.ones(2)}, second)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"'a' is in .*{first.name} and in {second.name}"):
        load(sharded)
    for name in ("x", "y"):
        (sharded / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has several indices"):
        load(sharded)


def test_what_is_no_checkpoint_is_refused_with_what_was_looked_for(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"a\.txt is no checkpoint of a known format: looked"):
        load(tmp_path / "a.txt")
    with pytest.raises(CheckpointError, match="is no checkpoint of a known format: looked for"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="format='zip': expected 'auto', 'safetensors'"):
        load(tmp_path, format="zip")
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors"):
        load(tmp_path, format="safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"source_step=3, but .* is one checkpoint"):
        load(tmp_path, source_step=3)


def test_a_folder_is_told_by_its_files(tmp_path):
    assert importing._kind(tmp_path) is None
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert importing._kind(tmp_path) == "safetensors"
    (tmp_path / ".metadata").write_bytes(b"x")
    assert importing._kind(tmp_path) == "dcp"
    about = tmp_path / "metadata.json"
    about.write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    assert importing._kind(tmp_path) == "torch_dist"
    about.write_text('{"written_by": "somebody"}')
    assert importing._kind(tmp_path) == "dcp"
    about.write_text("{")
    with pytest.raises(CheckpointError, match=r"metadata\.json cannot be read .* name the format"):
        importing._kind(tmp_path)


def test_a_format_whose_modules_are_missing_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setitem(exporting._WRITERS, "dcp", "mb_ckpt.interop.nowhere:write_dcp")
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, {"w": torch.ones(2)}).result()
        with pytest.raises(
            CheckpointError, match=r"dcp needs the module mb_ckpt\.interop\.nowhere"
        ):
            export_checkpoint(store, tmp_path / "out", to="dcp")
    assert files_of(tmp_path) == ["run"]


def test_plain_data_that_do_not_fit_are_refused(tmp_path):
    with CheckpointStore(tmp_path / "run") as store:
        store.save(1, {"w": torch.ones(2), "n": 1}).result()
        export(store, tmp_path / "out")
    path = tmp_path / "out" / "mb_ckpt_plain.json"
    data = json.loads(path.read_bytes())
    assert data == {"format": 1, "step": 1, "tree": {"w": {"$tensor": "w"}, "n": 1}}
    for change, text in [
        ({"format": 2}, "has format 2, this mb-ckpt reads 1: use a newer one"),
        ({"tree": {"v": {"$tensor": "v"}}}, "tells of tensor 'v', which the files lack"),
        ({"tree": {"w": 3}}, "has plain data 'w', the name of a tensor"),
        ({"tree": 3}, "cannot be read"),
    ]:
        path.write_text(json.dumps(data | change))
        with pytest.raises(CheckpointError, match=text):
            load(tmp_path / "out")
    path.unlink()
    done, found = load(tmp_path / "out")
    assert (done.step, list(found)) == (0, ["w"])


def test_pickles_are_taken_over_only_if_asked_and_never_run(tmp_path):
    with (
        CheckpointStore(tmp_path / "run", allow_pickle=True) as store,
        CheckpointStore(tmp_path / "back") as back,
    ):
        store.save(1, {"w": torch.ones(2), "made": {"at": PurePosixPath("a/b")}}).result()
        export(store, tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"plain\.json holds pickles \(made\.at\), which"):
            import_checkpoint(tmp_path / "out", back)
        import_checkpoint(tmp_path / "out", back, allow_pickle=True)
        assert not store.compare(back).differs
        assert repr(back.inspect().plain["made"]["at"]).startswith("<pickled pathlib.PurePosixPath")


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mb-ckpt\[safetensors\]'"):
        load(tmp_path)


# Memory

MEMORY = """
import sys, torch
from mb_ckpt import CheckpointStore, export_checkpoint, import_checkpoint
from safetensors.torch import save_file

def peak():  # ru_maxrss would count what the parent process has held
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

what, root = sys.argv[1:]
save_file({"w": torch.ones(2, 2)}, f"{root}/warm.safetensors")
with CheckpointStore(f"{root}/warm{what}") as store:  # imports and threads, once
    import_checkpoint(f"{root}/warm.safetensors", store)
    export_checkpoint(store, f"{root}/warm-{what}", to="safetensors")
before = peak()
if what == "export":
    with CheckpointStore(f"{root}/run") as store:
        export_checkpoint(store, f"{root}/out", to="safetensors", max_shard_size="100MB")
else:
    with CheckpointStore(f"{root}/back") as store:
        import_checkpoint(f"{root}/out", store)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_largest_tensor(tmp_path):
    largest, count = 48, 5  # MiB, tensors
    generator = torch.Generator().manual_seed(1)
    with CheckpointStore(tmp_path / "run") as store:
        shape = (largest, 1 << 18)
        state = {str(i): torch.rand(shape, generator=generator) for i in range(count)}
        store.save(1, state).result()
        for what in ("export", "import"):
            command = [sys.executable, "-c", MEMORY, what, str(tmp_path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(what, done.stdout)
            assert float(done.stdout) < largest + 64, what
        with CheckpointStore(tmp_path / "back") as back:
            assert not store.compare(back).differs
