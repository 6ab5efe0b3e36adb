# SPDX-License-Identifier: Apache-2.0
"""Shard files written and read by our own code, against tensorstore's."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from itertools import pairwise

import numpy as np
import pytest
from mb_ckpt.format import local_reader, local_writer
from mb_ckpt.format.local_reader import DamagedChunkError, LocalArray
from mb_ckpt.format.local_writer import PAGE, write_shards
from mb_ckpt.format.packed import Grid, RemoteArray, array_metadata, open_array, write_array

DIRECT = getattr(os, "O_DIRECT", 0)


def page_of_random(nbytes):
    """Return random bytes that begin at a page."""
    data = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    data[:] = np.frombuffer(random.Random(nbytes).randbytes(nbytes), np.uint8)
    return data


def grid_of(nbytes, inner=PAGE, chunks=4):
    return Grid(nbytes, inner, inner * chunks)


def kvstore(folder):
    return {"driver": "file", "path": f"{folder}/"}


@pytest.fixture
def direct_disk(tmp_path):
    """A folder on a disk that takes direct writes."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | DIRECT))
    except OSError:
        pytest.skip("this disk takes no direct writes")
    if not DIRECT:
        pytest.skip("this system has no direct writes")
    return tmp_path


SIZES = [1, 100, PAGE, PAGE + 1, 3 * PAGE, 4 * PAGE, 4 * PAGE + 5, 11 * PAGE - 3]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("shift", [0, 7])
def test_what_is_written_is_an_array_to_tensorstore(tmp_path, direct, shift):
    for nbytes in SIZES:
        data, grid = page_of_random(nbytes + shift)[shift:], grid_of(nbytes)
        write_shards(tmp_path / f"{nbytes}", data, grid, direct=direct)
        array = open_array(kvstore(tmp_path), f"{nbytes}", array_metadata(grid))
        assert (array.read().result() == data).all(), nbytes


def test_what_tensorstore_wrote_is_read(tmp_path):
    for nbytes in SIZES:
        data, grid = page_of_random(nbytes), grid_of(nbytes)
        array = open_array(kvstore(tmp_path), f"{nbytes}", array_metadata(grid))
        array[:].write(data).result()
        out = np.zeros(nbytes, np.uint8)
        LocalArray(tmp_path / f"{nbytes}", grid).read(0, [out.data])
        assert (out == data).all(), nbytes


def forget(folder):
    """Drop the files below *folder* from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


@pytest.mark.parametrize("past_cache", [True, False])
@pytest.mark.parametrize("writer", ["local", "tensorstore"])
@pytest.mark.parametrize("kind", ["local", "tensorstore"])
def test_any_run_is_read_into_any_pieces(tmp_path, kind, writer, past_cache):
    nbytes, chosen = 43 * PAGE - 3, random.Random(3)
    data, grid = page_of_random(nbytes), grid_of(nbytes, chunks=16)
    if writer == "local":
        write_shards(tmp_path / "a", data, grid)
    else:
        open_array(kvstore(tmp_path), "a", array_metadata(grid)).write(data).result()
    forget(tmp_path)
    local = LocalArray(tmp_path / "a", grid)
    array = local if kind == "local" else RemoteArray(kvstore(tmp_path), "a", grid)
    for _ in range(100):
        start, stop = sorted(chosen.choices(range(nbytes + 1), k=2))
        cuts = sorted({start, stop, *chosen.choices(range(start, stop + 1), k=3)})
        pieces = [np.zeros(b - a, np.uint8) for a, b in pairwise(cuts)]
        array.read(start, [piece.data for piece in pieces], past_cache=past_cache)
        got = np.concatenate([np.zeros(0, np.uint8), *pieces])
        assert (got == data[start:stop]).all(), cuts


def test_chunks_begin_at_pages_and_go_past_the_page_cache(direct_disk, monkeypatch):
    nbytes, seen, pwritev = 9 * PAGE + 5, [], os.pwritev

    def watched(file, buffers, at):
        direct = fcntl.fcntl(file, fcntl.F_GETFL) & DIRECT
        seen.append((direct, {len(b) % PAGE for b in buffers}, at % PAGE))
        return pwritev(file, buffers, at)

    monkeypatch.setattr(os, "pwritev", watched)
    write_shards(direct_disk / "a", page_of_random(nbytes), grid_of(nbytes))
    assert len(seen) == 6, "chunks, then the index, of three files"
    assert all(found == (DIRECT, {0}, 0) for found in seen), seen


@pytest.mark.parametrize("refusal", ["open", "write", "half a page"])
def test_a_disk_that_refuses_direct_writes_is_written_through_the_cache(
    direct_disk, monkeypatch, refusal
):
    nbytes, real_open, pwritev = 9 * PAGE + 5, os.open, os.pwritev
    refused = []

    def opened(path, flags, *mode):
        if refusal == "open" and flags & DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, *mode)

    def written(file, buffers, at):
        if not fcntl.fcntl(file, fcntl.F_GETFL) & DIRECT or refusal == "open":
            return pwritev(file, buffers, at)
        refused.append(at)
        if refusal == "write":
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        if at % PAGE:
            raise AssertionError("not at a page")
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~DIRECT)
        try:
            return pwritev(file, [buffers[0][:100]], at)
        finally:
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | DIRECT)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwritev", written)
    data, grid = page_of_random(nbytes), grid_of(nbytes)
    write_shards(direct_disk / "a", data, grid)
    out = np.zeros(nbytes, np.uint8)
    LocalArray(direct_disk / "a", grid).read(0, [out.data])
    assert (out == data).all()
    assert len(refused) == 3, "once a file"


def test_many_short_writes_and_reads_add_up(tmp_path, monkeypatch):
    nbytes, pwritev, preadv = 9 * PAGE + 5, os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda f, b, at: pwritev(f, [b[0][:777]], at))
    data, grid = page_of_random(nbytes + 1)[1:], grid_of(nbytes)
    write_shards(tmp_path / "a", data, grid)
    monkeypatch.setattr(os, "preadv", lambda f, b, at: preadv(f, [b[0][:555]], at))
    out = np.zeros(nbytes, np.uint8)
    LocalArray(tmp_path / "a", grid).read(0, [out.data])
    assert (out == data).all()


def test_what_is_in_the_page_cache_is_read_from_there(direct_disk, monkeypatch):
    nbytes, grid, opened, real_open = 8 * PAGE, grid_of(8 * PAGE), [], os.open
    data = page_of_random(nbytes)
    write_shards(direct_disk / "a", data, grid, direct=False)

    def watched(path, flags, *mode):
        opened.append(bool(flags & DIRECT))
        return real_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", watched)
    out = np.zeros(nbytes, np.uint8)
    LocalArray(direct_disk / "a", grid).read(0, [out.data], past_cache=True)
    assert opened == [False, False], "both files were just written through the cache"
    forget(direct_disk)
    opened.clear()
    LocalArray(direct_disk / "a", grid).read(0, [out.data], past_cache=True)
    assert opened == [False, True, False, True], "the index is read in the usual way"
    assert (out == data).all()


def test_a_file_system_that_maps_nothing_is_read_in_the_usual_way(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    data, grid, out = page_of_random(9), grid_of(9), np.zeros(9, np.uint8)
    write_shards(tmp_path / "a", data, grid)
    monkeypatch.setattr(mmap, "mmap", refused)
    LocalArray(tmp_path / "a", grid).read(0, [out.data], past_cache=True)
    assert (out == data).all()


@pytest.mark.parametrize("past_cache", [True, False])
def test_every_flipped_bit_of_a_file_is_noticed(tmp_path, monkeypatch, past_cache):
    monkeypatch.setattr(local_reader, "_is_cached", lambda *_: False)
    nbytes, chosen = 4 * PAGE - 9, random.Random(1)
    data, grid = page_of_random(nbytes), grid_of(nbytes)
    write_shards(tmp_path / "a", data, grid)
    path, out = tmp_path / "a" / "c" / "0", np.zeros(nbytes, np.uint8)
    raw = path.read_bytes()
    for bit in chosen.sample(range(8 * len(raw)), 400):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedChunkError, match=r'DATA_LOSS: .*a/c/0"'):
            LocalArray(tmp_path / "a", grid).read(0, [out.data], past_cache=past_cache)
    for length in range(0, len(raw), 1000):
        path.write_bytes(raw[:length])
        with pytest.raises(DamagedChunkError, match="the index is damaged or cut short"):
            LocalArray(tmp_path / "a", grid).read(0, [out.data], past_cache=past_cache)
    path.write_bytes(raw)
    LocalArray(tmp_path / "a", grid).read(0, [out.data], past_cache=past_cache)
    assert (out == data).all()


def test_a_chunk_that_is_in_no_index_is_missing_and_never_zeros(tmp_path):
    grid = grid_of(4 * PAGE)
    array = open_array(kvstore(tmp_path), "a", array_metadata(grid))
    array[: 2 * PAGE].write(page_of_random(2 * PAGE)).result()
    out = np.zeros(4 * PAGE, np.uint8)
    local = LocalArray(tmp_path / "a", grid)
    local.read(0, [out[: 2 * PAGE].data])
    with pytest.raises(DamagedChunkError, match="NOT_FOUND: chunk 2 is missing"):
        local.read(0, [out.data])


def test_compressed_arrays_go_through_tensorstore(tmp_path):
    nbytes = 3 * PAGE
    grid = Grid(nbytes, PAGE, 2 * PAGE, compression=3)
    assert not local_writer.is_local(kvstore(tmp_path), grid.compression)
    write_array(kvstore(tmp_path), "a", np.zeros(nbytes, np.uint8), grid)
    assert sum(path.stat().st_size for path in (tmp_path / "a" / "c").iterdir()) < nbytes // 4
