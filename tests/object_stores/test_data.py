# SPDX-License-Identifier: Apache-2.0
"""Data sets whose files lie in an object store, against a real S3 API on loopback."""

from __future__ import annotations

import gzip
import json

import boto3
import pytest
from mb_config import TokenizerConfig
from mb_engine.data import DataError, build_datasets
from mb_engine.data.indexed_build import BuildOptions, build_indexed_files
from mb_engine.data.records import read_records
from mb_engine.data.text import load_tokens
from mb_engine.data.tokenizers import ByteTokenizer
from mb_engine.runtime import megatron_compat, megatron_cpu
from mb_engine.testing import tiny_config
from moto.server import ThreadedMotoServer

BUCKET = "corpus"
TEXTS = [f"document {i}: " + "some words of it " * 20 for i in range(40)]


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        yield server
    server.stop()


@pytest.fixture(scope="module")
def files(server):
    """The same files in a bucket and, by name, as bytes."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    chats = [{"prompt": f"What is {i}?", "completion": f" The number {i}."} for i in range(30)]
    made = {
        "web/a.jsonl": lines,
        "web/deep/b.jsonl.gz": gzip.compress(lines),
        "plain.txt": "a text in UTF-8, é".encode(),
        "chats.jsonl": "".join(json.dumps(chat) + "\n" for chat in chats).encode(),
    }
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for name, content in made.items():
        client.put_object(Bucket=BUCKET, Key=name, Body=content)
    return client, made


def build(output, *inputs):
    options = BuildOptions(
        inputs=inputs, output=output, tokenizer=TokenizerConfig(), workers=1, skip_bad=False
    )
    return build_indexed_files(options)


def test_records_and_texts_are_read_as_from_a_folder(files, tmp_path):
    (tmp_path / "plain.txt").write_bytes(files[1]["plain.txt"])
    here = load_tokens([str(tmp_path / "plain.txt")], ByteTokenizer(), setting="dataset.path")
    there = load_tokens([f"s3://{BUCKET}/pl*.txt"], ByteTokenizer(), setting="dataset.path")
    assert there.tolist() == here.tolist()
    for name in ("web/a.jsonl", "web/deep/b.jsonl.gz"):
        found = [record.value["text"] for record in read_records(f"s3://{BUCKET}/{name}")]
        assert found == TEXTS


def test_indexed_files_are_built_from_there_and_streamed_from_there(files, tmp_path):
    client, made = files
    for name in ("web/a.jsonl", "web/deep/b.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(made[name])
    report = build(tmp_path / "there", f"s3://{BUCKET}/web/**/*.jsonl*")
    assert report.documents == 2 * len(TEXTS)
    build(tmp_path / "here", str(tmp_path / "web" / "**" / "*.jsonl*"))
    for end in (".bin", ".idx"):
        assert (tmp_path / f"there{end}").read_bytes() == (tmp_path / f"here{end}").read_bytes()
        client.upload_file(str(tmp_path / f"here{end}"), BUCKET, f"tokens/all{end}")

    megatron_cpu.install()
    megatron_compat.prepare_megatron()

    def samples(path, *overrides):
        config = tiny_config(
            "dataset.type=indexed", f"dataset.path=['{path}']", "model.vocab_size=257",
            "train.train_iters=5", "train.global_batch_size=4", *overrides,
        )  # fmt: skip
        train = build_datasets(config.finalize(1), ByteTokenizer()).train
        return [train[i]["tokens"].tolist() for i in range(len(train))]

    cache = f"dataset.cache_dir={tmp_path / 'cache'}"
    assert samples(f"s3://{BUCKET}/tokens/all", cache) == samples(tmp_path / "here")
    with pytest.raises(DataError, match=r"cache_dir is not set, and s3://.*name a folder"):
        samples(f"s3://{BUCKET}/tokens/all")


def test_sft_data_are_prepared_anew_when_the_object_changes(files, tmp_path):
    client, made = files

    def sizes():
        config = tiny_config(
            "dataset.type=sft", f"dataset.path=['s3://{BUCKET}/chats.jsonl']",
            f"dataset.cache_dir={tmp_path}", "dataset.split='100,0,0'", "model.seq_length=64",
        )  # fmt: skip
        return len(build_datasets(config.finalize(1), ByteTokenizer()).train)

    assert (sizes(), sizes()) == (30, 30)
    half = b"".join(made["chats.jsonl"].splitlines(keepends=True)[:15])
    client.put_object(Bucket=BUCKET, Key="chats.jsonl", Body=half)
    assert sizes() == 15


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"s3://{BUCKET}/none.txt", r"none\.txt does not exist"),
        (f"s3://{BUCKET}/no*.txt", r"no file matches"),
        ("ftp://host/a.txt", r"ftp://host/a\.txt: Unrecognized filesystem.*s3://, gs://"),
    ],
)
def test_what_is_missing_is_named(files, path, message):
    with pytest.raises(DataError, match=message):
        load_tokens([path], ByteTokenizer(), setting="dataset.path")


def test_a_store_that_megatron_cannot_stream_from_is_refused():
    config = tiny_config("dataset.type=indexed", "dataset.path=['gs://b/tokens']")
    with pytest.raises(DataError, match=r"gs://b/tokens: megatron-core streams .* s3:// alone"):
        build_datasets(config.finalize(1), ByteTokenizer())
