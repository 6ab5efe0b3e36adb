# SPDX-License-Identifier: Apache-2.0
"""Damaged storage is noticed and named; never a wrong tensor, never zeros."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore, CorruptCheckpointError
from mb_ckpt.format import packed

FLIPS = 300
"""In data files; with those in the manifest, more than 500."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A step of several small files, and a function that loads all of it into garbage."""
    monkeypatch.setattr(packed, "LOCAL_SHARD_BYTES", 16384)
    monkeypatch.setattr(packed, "INNER_BYTES", 4096)
    state = {f"t{i}": torch.randn(900, generator=torch.manual_seed(i)) for i in range(12)}
    with CheckpointStore(tmp_path) as store:
        store.save(4, {**state, "n": {"lr": 0.1}})
    (data,) = (tmp_path / "step_00000004").glob("data-*/rank_00000")
    assert len(list((data / "c").iterdir())) == 3

    def load():
        room = {key: torch.full((900,), -1.0) for key in state}
        with CheckpointStore(tmp_path) as store:
            store.load(room, 4)
        return all(torch.equal(room[key], state[key]) for key in state)

    return tmp_path, data, load


def flip(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def test_a_flipped_bit_anywhere_in_the_data_is_detected_at_load_and_by_verify(run):
    root, data, load = run
    files = sorted((data / "c").iterdir())
    chosen = random.Random(0)
    for i in range(FLIPS):
        path = chosen.choice(files)
        bit = chosen.randrange(path.stat().st_size * 8)
        flip(path, bit)
        if i % 10 == 0:
            with (
                CheckpointStore(root) as store,
                pytest.raises(CorruptCheckpointError, match="corrupt"),
            ):
                store.verify(4)
        with pytest.raises(CorruptCheckpointError, match=rf"c/{path.name} is corrupt.*tensor 't"):
            load()
        flip(path, bit)
    assert load()


def test_the_damaged_tensor_is_named_and_the_others_still_load(run):
    root, data, _ = run
    # Tensors are 3600 bytes each, checksums cover 4096: t1 lies in the first two blocks, and
    # its bytes from 4096 on share a block with the beginning of t2.
    values = torch.randn(900, generator=torch.manual_seed(1)).numpy().tobytes()
    flip(data / "c" / "0", 8 * (data / "c" / "0").read_bytes().index(values[1000:1100]))
    with CheckpointStore(root) as store:
        for key in ("t1", "t2"):
            with pytest.raises(CorruptCheckpointError, match=f"holds tensor '{key}': load"):
                store.load({key: torch.zeros(900)})
        with pytest.raises(CorruptCheckpointError, match="holds tensor 't1', 't2': load another"):
            store.verify()
        room = {f"t{i}": torch.zeros(900) for i in (0, *range(3, 12))}
        store.load(room)
    for i in (0, *range(3, 12)):
        expected = torch.randn(900, generator=torch.manual_seed(i))
        assert torch.equal(room[f"t{i}"], expected)


def test_a_flipped_bit_anywhere_in_the_manifest_is_detected(run):
    root, _, load = run
    path = root / "step_00000004" / "manifest.json"
    chosen, bits = random.Random(1), path.stat().st_size * 8
    somewhere = [chosen.randrange(bits) for _ in range(60)]
    for bit in [*range(0, 1200, 7), *somewhere, *range(bits - 24, bits)]:
        flip(path, bit)
        with pytest.raises(CheckpointError, match=r"is corrupt|format_version=\d+.*upgrade"):
            load()
        flip(path, bit)
    assert load()


@pytest.mark.parametrize("damage", ["missing", "empty", "short"])
def test_a_file_that_is_missing_or_cut_short_is_an_error_and_never_zeros(run, damage):
    root, data, load = run
    path = data / "c" / "1"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:5000])
    word = "missing" if damage == "missing" else "corrupt"
    with pytest.raises(CorruptCheckpointError, match=rf"rank_00000/c/1 is {word}.*'t4'"):
        load()
    with CheckpointStore(root) as store, pytest.raises(CorruptCheckpointError, match=word):
        store.verify(4)


def test_a_gap_in_a_file_of_zeros_is_an_error_too(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"w": torch.zeros(100)}).result()
        (path,) = tmp_path.glob("step_*/data-*/rank_00000/c/0")
        path.unlink()
        with pytest.raises(CorruptCheckpointError, match="missing, it holds tensor 'w'"):
            store.load({"w": torch.ones(100)})


def test_verify_sees_damaged_array_metadata_which_loading_does_not_need(run):
    root, data, load = run
    flip(data / "zarr.json", 100)
    assert load()
    with (
        CheckpointStore(root) as store,
        pytest.raises(CorruptCheckpointError, match=r"zarr.json is"),
    ):
        store.verify()


def test_the_array_is_plain_zarr_to_other_readers(run):
    """Opened without our code: no metadata assumed, by tensorstore's own reading of zarr.json."""
    import tensorstore as ts

    _, data, _ = run
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{data}/"}}
    raw = ts.open(spec, open=True).result().read().result().tobytes()
    assert raw[3600:7200] == torch.randn(900, generator=torch.manual_seed(1)).numpy().tobytes()


def test_a_corrupt_newest_step_is_passed_over_with_a_warning(run, caplog):
    root, _, _ = run
    with CheckpointStore(root) as store:
        store.save(9, {"w": torch.ones(2)}).result()
        flip(root / "step_00000009" / "manifest.json", 900)
        with caplog.at_level(logging.WARNING):
            assert store.load({}) == {"n": {"lr": 0.1}}
        assert "step_00000009/manifest.json is corrupt" in caplog.text
        with pytest.raises(CorruptCheckpointError, match=r"step_00000009/manifest.json is corrupt"):
            store.load({}, 9)


def test_a_newer_format_is_never_passed_over(run):
    root, _, _ = run
    with CheckpointStore(root) as store:
        store.save(9, {"w": torch.ones(2)}).result()
        path = root / "step_00000009" / "manifest.json"
        raw = path.read_bytes().replace(b'"format_version":1,', b'"format_version":2,"more":{},', 1)
        path.write_bytes(raw)
        for step in (None, 9):
            with pytest.raises(
                CheckpointError, match=r"format_version=2, .*reads up to 1: upgrade"
            ):
                store.load({}, step)
