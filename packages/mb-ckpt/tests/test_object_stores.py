# SPDX-License-Identifier: Apache-2.0
"""Against a real S3 API on loopback: save, load, verify, prune, a crash, a lost server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
import torch
from mb_ckpt import CheckpointError, CheckpointStore, CorruptCheckpointError
from mb_ckpt.format import tensorstore_io
from mb_ckpt.places.stores import open_store
from mb_ckpt.testing import StoreKit
from moto.server import ThreadedMotoServer

WRITER = Path(__file__).with_name("s3_writer.py")


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server, request):
    """A new bucket, and what talks to it without our code."""
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    name = f"b{abs(hash(request.node.nodeid)) % 10**9}"
    client.create_bucket(Bucket=name)
    return client, name


@pytest.fixture
def url(server, bucket):
    return f"s3://{bucket[1]}/runs/a?endpoint={server}"


def state(step):
    return {f"t{i}": torch.full((3000,), step + i / 8) for i in range(6)} | {"n": step}


def check(store, step):
    room = {k: torch.full_like(v, -1) for k, v in state(step).items() if k != "n"}
    assert store.load(room, step)["n"] == step
    assert all(torch.equal(room[k], state(step)[k]) for k in room)


def keys(bucket):
    client, name = bucket
    return [o["Key"] for o in client.list_objects_v2(Bucket=name).get("Contents", [])]


@pytest.mark.parametrize("layout", ["packed", "zarr"])
@pytest.mark.parametrize("writer", ["thread", "process"])
def test_saves_loads_verifies_and_prunes(url, bucket, layout, writer):
    with CheckpointStore(url, keep_last=2, layout=layout, writer=writer) as store:
        for step in (1, 2, 3):
            store.save(step, state(step)).result()
        assert store.steps() == [2, 3]
        check(store, 2)
        check(store, 3)
        store.verify()
    found = keys(bucket)
    assert all(key.startswith("runs/a/") for key in found)
    assert not any("step_00000001" in key for key in found)
    assert "runs/a/step_00000003/manifest.json" in found


def test_the_environment_names_the_endpoint(server, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    with CheckpointStore(f"s3://{bucket[1]}") as store:
        store.save(4, state(4)).result()
        check(store, 4)
    assert "step_00000004/manifest.json" in keys(bucket)


def test_damage_is_found(url, bucket):
    client, name = bucket
    with CheckpointStore(url) as store:
        store.save(1, state(1)).result()
        (key,) = (k for k in keys(bucket) if k.endswith("/c/0"))
        body = bytearray(client.get_object(Bucket=name, Key=key)["Body"].read())
        body[5000] ^= 4
        client.put_object(Bucket=name, Key=key, Body=bytes(body))
        with pytest.raises(CorruptCheckpointError, match=r"/c/0 is corrupt.*'t0'"):
            check(store, 1)
        client.delete_object(Bucket=name, Key=key)
        with pytest.raises(CorruptCheckpointError, match=r"/c/0 is missing"):
            store.verify()


def test_a_writer_killed_in_the_middle_leaves_whole_steps(url, bucket, tmp_path):
    command = [sys.executable, WRITER, url]
    seen = []
    for pause in (0.3, 0.55, 0.8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "saved\n"
            time.sleep(pause)
            writer.send_signal(signal.SIGKILL)
        with CheckpointStore(url) as store:
            seen.append(store.steps()[-1])
            for step in store.steps():
                store.verify(step)
                room = {"w": torch.full((300_000,), -1.0)}
                store.load(room, step)
                assert (room["w"] == step).all()
    assert max(seen) >= 2
    with CheckpointStore(url, keep_last=1) as store:
        store.save(10_000, state(1)).result()
        left = {key.split("/")[2] for key in keys(bucket) if "step_" in key}
        assert left == {"step_00010000"}


def test_the_newer_of_two_writers_wins_and_the_older_is_told(url):
    with CheckpointStore(url) as first, CheckpointStore(url) as second:
        first.save(1, state(1)).result()
        second.save(2, state(2)).result()
        handle = first.save(3, state(3))
        with pytest.raises(
            CheckpointError, match=rf"process {os.getpid()} on .* is saving in s3://"
        ):
            handle.result()
        second.save(4, state(4)).result()
        assert second.steps() == [1, 2, 4]


def test_a_lost_server_fails_the_save_after_retries_and_the_run_goes_on(bucket, monkeypatch):
    import tensorstore as ts

    retries = {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"}
    monkeypatch.setattr(tensorstore_io, "CONTEXT", ts.Context({"s3_request_retries": retries}))
    port_of_nobody = "http://127.0.0.1:9"
    with CheckpointStore(f"s3://{bucket[1]}/run?endpoint={port_of_nobody}") as store:
        handle = store.save(1, state(1))
        with pytest.raises(CheckpointError, match=r"preparing step 1 in s3://.* failed: .*check"):
            handle.result(60)
        with pytest.raises(CheckpointError, match=r"listing s3://.* failed"):
            store.steps()


class TestS3Store(StoreKit):
    @pytest.fixture(autouse=True)
    def place(self, url):
        self.url = url
        self.count = 0

    def make_store(self):
        self.count += 1
        base, query = self.url.split("?")
        return open_store(f"{base}/{self.count}?{query}")


def test_gs_urls_and_missing_buckets():
    store = open_store("gs://bucket/some/run")
    assert store.kvstore == {"driver": "gcs", "bucket": "bucket", "path": "some/run/"}
    with pytest.raises(CheckpointError, match="'s3:///run' is not supported"):
        open_store("s3:///run")
