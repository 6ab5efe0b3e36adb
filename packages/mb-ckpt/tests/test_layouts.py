# SPDX-License-Identifier: Apache-2.0
"""The layout zarr: an array a tensor, as other tools read it, damaged or not; and zstd in both."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from mb_ckpt import CheckpointStore, CorruptCheckpointError
from mb_ckpt.format import zarr_arrays
from mb_ckpt.format.zarr_arrays import array_name, chunk_shape, is_shared
from mb_ckpt.states.boxes import Box
from mb_config.records import TensorShard

STATE = {
    "model": {"layer.0": torch.randn(64, 48), "bias/0": torch.arange(5), "flag": torch.tensor(True)},
    "half": torch.randn(7).half(), "complex": torch.randn(3, dtype=torch.complex64),
    "none": torch.zeros(0, 3), "zarr.json": torch.ones(2), "__x": torch.ones(1), "lr": 0.1,
}  # fmt: skip


def save(root, **settings):
    with CheckpointStore(root, layout="zarr", **settings) as store:
        store.save(3, STATE).result()
    (data,) = root.glob("step_00000003/data-*")
    return data


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_zarr_python_reads_every_tensor_by_its_key(tmp_path, compression):
    group = zarr.open_group(save(tmp_path, compression=compression), mode="r")
    found = dict(group.arrays())
    assert sorted(found) == sorted([
        "model.layer.0", "model.bias%2F0", "model.flag", "half", "complex", "none", "%7Aarr.json",
        "%5F_x",
    ])  # fmt: skip
    assert np.array_equal(found["model.layer.0"][:], STATE["model"]["layer.0"].numpy())
    assert np.array_equal(found["model.layer.0"][3:9, 5], STATE["model"]["layer.0"][3:9, 5].numpy())
    assert np.array_equal(found["model.bias%2F0"][:], np.arange(5))
    assert found["model.flag"][()]
    assert np.array_equal(found["half"][:], STATE["half"].numpy())
    assert np.array_equal(found["complex"][:], STATE["complex"].numpy())
    assert found["none"].shape == (0, 3)


def test_compression_makes_files_smaller_in_either_layout(tmp_path):
    sizes = {}
    for layout in ("packed", "zarr"):
        for level in (None, 1, 12):
            root = tmp_path / f"{layout}-{level}"
            settings = {} if level is None else {"compression": "zstd", "compression_level": level}
            with CheckpointStore(root, layout=layout, **settings) as store:
                words = torch.randint(0, 40, (300_000,), generator=torch.Generator().manual_seed(0))
                store.save(1, {"w": words}).result()
                assert store.inspect().compression == level
                room = torch.zeros_like(words)
                store.load({"w": room})
                assert torch.equal(room, words)
                store.verify()
            sizes[layout, level] = sum(
                p.stat().st_size for p in root.rglob("c/**/*") if p.is_file()
            )
        assert sizes[layout, None] > 2_400_000
        assert sizes[layout, 12] != sizes[layout, 1], "the level must have been used"
        assert max(sizes[layout, 1], sizes[layout, 12]) < 0.2 * sizes[layout, None]


def test_a_flipped_bit_anywhere_is_found_and_named(tmp_path):
    data = save(tmp_path, compression="zstd")
    files = sorted(p for p in data.rglob("*") if p.is_file() and p.name != "zarr.json")
    assert len(files) == 7
    chosen = random.Random(3)
    with CheckpointStore(tmp_path) as store:
        for _ in range(60):
            path = chosen.choice(files)
            raw = path.read_bytes()
            bit = chosen.randrange(len(raw) * 8)
            damaged = bytearray(raw)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            room = {k: torch.zeros_like(v) for k, v in STATE.items() if isinstance(v, torch.Tensor)}
            room["model"] = {k: torch.zeros_like(v) for k, v in STATE["model"].items()}
            key = str(path.relative_to(data)).split("/")[0]
            with pytest.raises(CorruptCheckpointError, match="is corrupt, it holds tensor") as said:
                store.load(room)
            assert f"/{key}/c" in str(said.value)
            with pytest.raises(CorruptCheckpointError, match="is corrupt, it holds tensor"):
                store.verify()
            path.write_bytes(raw)
        store.verify()


def test_a_missing_chunk_is_an_error_and_a_changed_description_is_seen_by_verify(tmp_path):
    data = save(tmp_path)
    with CheckpointStore(tmp_path) as store:
        chunk = data / "model.layer.0" / "c" / "0" / "0"
        raw = chunk.read_bytes()
        chunk.unlink()
        with pytest.raises(
            CorruptCheckpointError, match=r"model\.layer\.0/c/0/0 is missing.*layer"
        ):
            store.load({"model": {"layer.0": torch.zeros(64, 48)}})
        chunk.write_bytes(raw)
        (data / "half" / "zarr.json").write_text("{}")
        with pytest.raises(CorruptCheckpointError, match=r"half/zarr\.json is corrupt"):
            store.verify()


def piece(whole, rows, columns, flat=None):
    data = whole[slice(*rows), slice(*columns)]
    local = tuple(data.shape)
    data = data.reshape(-1)[slice(*flat)] if flat else data
    return TensorShard(
        key="w", data=data.contiguous(), global_shape=tuple(whole.shape),
        offset=(rows[0], columns[0]), local_shape=local, dtype="float32", flat_range=flat,
    )  # fmt: skip


def test_pieces_that_share_chunks_are_stored_whole_too(tmp_path):
    whole = torch.randn(11, 13)
    cuts = [((0, 3), (0, 13)), ((3, 11), (0, 5)), ((3, 11), (5, 13), (0, 30)),
            ((3, 11), (5, 13), (30, 64))]  # fmt: skip
    with CheckpointStore(tmp_path, layout="zarr") as store:
        store.save(1, {"w": [piece(whole, *cut) for cut in cuts]}).result()
        room = torch.zeros(11, 13)
        store.load({"w": room})
        assert torch.equal(room, whole)
        assert store.inspect().tensors["w"].pieces == 1, "they were to share a chunk"


@given(
    shape=st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple),
    parts=st.integers(1, 6),
    width=st.sampled_from([1, 4, 16]),
)
def test_equal_parts_of_some_size_never_share_chunks(shape, parts, width):
    edges = np.linspace(0, shape[0], parts + 1).astype(int)
    boxes = [
        Box((int(a), *(0 for _ in shape[1:])), (int(b - a), *shape[1:]))
        for a, b in pairwise(edges)
        if b > a
    ]
    chunks = chunk_shape(shape, width, boxes)
    assert all(1 <= c <= n for c, n in zip(chunks, shape, strict=True))
    shared = any(is_shared(shape, chunks, box) for box in boxes)
    if shape[0] % parts == 0 and width * np.prod(shape) // parts >= zarr_arrays._SMALL:
        assert not shared


def test_large_tensors_are_cut_into_chunks_of_limited_size():
    assert chunk_shape((50_257, 4096), 4, [Box((0, 0), (50_257, 4096))]) == (512, 4096)
    halves = [Box((0, 0), (30_000, 4096)), Box((30_000, 0), (30_000, 4096))]
    rows, columns = chunk_shape((60_000, 4096), 4, halves)
    assert 30_000 % rows == 0
    assert columns == 4096
    assert rows * columns * 4 <= zarr_arrays.CHUNK_BYTES


@pytest.mark.parametrize(
    ("key", "name"),
    [("a.b", "a.b"), ("a/b c", "a%2Fb%20c"), ("..", "%2E."), ("zarr.json", "%7Aarr.json"),
     ("__a", "%5F_a"), ("ä", "%C3%A4"), ("%2F", "%252F"), ("", "%")],
)  # fmt: skip
def test_names_of_arrays_are_safe_and_different(key, name):
    assert array_name(key) == name
