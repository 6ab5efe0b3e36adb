# SPDX-License-Identifier: Apache-2.0
"""Indexed files: built from every kind of input, read by megatron-core, split and blended."""

from __future__ import annotations

import gzip
import importlib.util
import json
import time
import warnings

import numpy as np
import pytest
import torch
from chat_styles import save_tokenizer
from mb_config import TokenizerConfig
from mb_engine.cli import main
from mb_engine.data import DataError, build_datasets, build_tokenizer
from mb_engine.data import indexed_build as build_module
from mb_engine.data.indexed_build import BuildOptions, build_indexed_files
from mb_engine.data.tokenizers import ByteTokenizer
from mb_engine.runtime import megatron_compat, megatron_cpu
from mb_engine.testing import run_ranks, tiny_config

TEXTS = [f"document {i} " + "é" * (i % 7) for i in range(50)]


@pytest.fixture(scope="module", autouse=True)
def megatron():
    megatron_cpu.install()
    megatron_compat.prepare_megatron()


def jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: t}) + "\n" for t in texts), encoding="utf-8")
    return path


def build(output, *inputs, **options):
    options.setdefault("workers", 1)
    return build_indexed_files(
        BuildOptions(
            inputs=tuple(map(str, inputs)), output=output, tokenizer=TokenizerConfig(), **options
        )
    )


def documents(prefix):
    """Return the documents as megatron-core reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.19 warns that there is no rank
        data = IndexedDataset(str(prefix))
    assert data.document_indices.tolist() == list(range(len(data) + 1))
    return [data[i].tolist() for i in range(len(data))]


def ids_of(texts):
    return [[*text.encode(), 256] for text in texts]


class TestBuild:
    def test_megatron_core_reads_what_was_written(self, tmp_path):
        report = build(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS))
        assert documents(tmp_path / "out") == ids_of(TEXTS)
        assert report.documents == 50
        assert report.tokens == sum(len(t.encode()) + 1 for t in TEXTS)
        assert not (tmp_path / "out.parts").exists()

    def test_all_kinds_of_input_give_the_same(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        plain = jsonl(tmp_path / "a.jsonl", TEXTS)
        with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
            file.write(plain.read_bytes())
        parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=7)
        (tmp_path / "texts").mkdir()
        for i, text in enumerate(TEXTS):
            (tmp_path / "texts" / f"{i:03d}.txt").write_text(text, encoding="utf-8")
        for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "texts/*.txt"):
            build(tmp_path / "out", tmp_path / name)
            assert documents(tmp_path / "out") == ids_of(TEXTS), name

    def test_blocks_and_processes_change_nothing(self, tmp_path, monkeypatch):
        path = jsonl(tmp_path / "a.jsonl", TEXTS)
        monkeypatch.setattr(build_module, "_BLOCK", 100)
        one = build(tmp_path / "one", path)
        two = build(tmp_path / "two", path, workers=2)
        assert one.blocks > 10
        assert one == two
        assert documents(tmp_path / "one") == documents(tmp_path / "two") == ids_of(TEXTS)

    def test_a_large_vocabulary_takes_four_bytes(self, tmp_path):
        (tmp_path / "a.txt").write_text("65536 1 70000")
        options = BuildOptions(
            inputs=(str(tmp_path / "a.txt"),),
            output=tmp_path / "out",
            tokenizer=TokenizerConfig(tokenizer_type="null", vocab_size=70001),
            workers=1,
            append_eod=False,
        )
        assert build_indexed_files(options).tokens == 3
        assert documents(tmp_path / "out") == [[65536, 1, 70000]]

    def test_huggingface_tokenizers_read_many_documents_at_once(self, tmp_path):
        tokenizer = TokenizerConfig(
            tokenizer_type="huggingface", tokenizer_model=str(save_tokenizer(tmp_path / "t"))
        )
        path = jsonl(tmp_path / "a.jsonl", TEXTS)
        build_indexed_files(
            BuildOptions(
                inputs=(str(path),), output=tmp_path / "out", tokenizer=tokenizer, workers=1
            )
        )
        oracle = build_tokenizer(tokenizer)
        assert documents(tmp_path / "out") == [[*oracle.encode(t), oracle.eod] for t in TEXTS]


class TestInterruption:
    def test_goes_on_with_the_blocks_that_are_missing(self, tmp_path, monkeypatch):
        path = jsonl(tmp_path / "a.jsonl", TEXTS)
        monkeypatch.setattr(build_module, "_BLOCK", 100)
        made = []
        make = build_module._make_part

        def make_or_stop(task):
            if len(made) == 4:
                raise KeyboardInterrupt
            made.append(task[0])
            return make(task)

        monkeypatch.setattr(build_module, "_make_part", make_or_stop)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out", path)
        assert not (tmp_path / "out.idx").exists()
        monkeypatch.setattr(build_module, "_make_part", make)
        assert build(tmp_path / "out", path).blocks_reused == 4
        assert documents(tmp_path / "out") == ids_of(TEXTS)

    def test_another_input_starts_anew(self, tmp_path, monkeypatch):
        path = jsonl(tmp_path / "a.jsonl", [*TEXTS, 3])
        with pytest.raises(DataError):
            build(tmp_path / "out", path)
        assert (tmp_path / "out.parts" / "000000.json").is_file()
        jsonl(path, TEXTS[:5])
        report = build(tmp_path / "out", path)
        assert (report.blocks_reused, report.documents) == (0, 5)


class TestBrokenInput:
    BROKEN = b'{"text": "a"}\n\n{"text": 1}\n{"other": "b"}\n{"text"\n\xff\n{"text": ""}\n{"text": "z"}\n'

    def test_the_first_is_named_with_its_line_in_the_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.jsonl"
        path.write_bytes(self.BROKEN)
        monkeypatch.setattr(build_module, "_BLOCK", 20)
        with pytest.raises(DataError, match=r"a.jsonl, line 3: field 'text' is not text.*on-error"):
            build(tmp_path / "out", path)

    @pytest.mark.parametrize("block", [10, 1 << 20])
    def test_they_are_skipped_and_counted_where_asked(self, tmp_path, monkeypatch, block):
        path = tmp_path / "a.jsonl"
        path.write_bytes(self.BROKEN)
        monkeypatch.setattr(build_module, "_BLOCK", block)
        report = build(tmp_path / "out", path, skip_bad=True)
        assert documents(tmp_path / "out") == ids_of(["a", "z"])
        assert (report.bad, report.empty, report.documents) == (4, 1, 2)
        found = [e.split("a.jsonl, ")[1].split(":")[0] for e in report.examples]
        assert found == ["line 3", "line 4", "line 5", "line 6"]

    def test_files_that_are_missing_empty_or_without_text_are_named(self, tmp_path):
        with pytest.raises(DataError, match=r"absent.jsonl does not exist"):
            build(tmp_path / "out", tmp_path / "absent.jsonl")
        (tmp_path / "a.jsonl").write_text("")
        with pytest.raises(DataError, match=r"a.jsonl is empty"):
            build(tmp_path / "out", tmp_path / "a.jsonl")
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
        with pytest.raises(DataError, match=r"no input has any text"):
            build(tmp_path / "out", tmp_path / "a.jsonl")
        (tmp_path / "b.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"b.parquet cannot be read"):
            build(tmp_path / "out", tmp_path / "b.parquet")


class TestCommand:
    def test_builds_and_counts(self, tmp_path, capsys):
        path = jsonl(tmp_path / "a.jsonl", TEXTS, key="body")
        arguments = ["--input", str(path), "--output", str(tmp_path / "out"), "--workers=1"]
        assert main(["data", "build", *arguments, "--text-key=body"]) == 0
        assert "documents  50" in capsys.readouterr().out
        assert main(["data", "build", *arguments]) == 2
        assert "line 1: field 'text' is missing" in capsys.readouterr().err
        assert main(["data", "build", *arguments, "--workers=-1"]) == 2
        assert "--workers=-1: must be 0 or more" in capsys.readouterr().err
        (tmp_path / "x.txt").write_text("1 2")
        null = ["tokenizer.tokenizer_type='null'", "tokenizer.vocab_size=9"]
        arguments[1] = str(tmp_path / "x.txt")
        assert main(["data", "build", *arguments, "--no-eod", *null]) == 0
        assert documents(tmp_path / "out") == [[1, 2]]


def config_of(*prefixes, overrides=()):
    return tiny_config(
        "dataset.type=indexed", f"dataset.path={[str(p) for p in prefixes]}",
        "model.vocab_size=257", "train.train_iters=5", "train.global_batch_size=4", *overrides,
    ).finalize(1)  # fmt: skip


def tokens_of(dataset):
    return np.concatenate([np.asarray(dataset[i]["tokens"]) for i in range(len(dataset))])


def first_rows(prefix):
    """Return the first training samples of a rank of a process group; rank 0 comes last."""
    megatron_cpu.install()
    megatron_compat.prepare_megatron()
    torch.distributed.init_process_group("gloo")
    try:
        if torch.distributed.get_rank() == 0:
            time.sleep(0.5)
        train = build_datasets(config_of(prefix), ByteTokenizer()).train
        return [train[i]["tokens"].tolist() for i in range(3)]
    finally:
        torch.distributed.destroy_process_group()


class TestDatasets:
    @pytest.fixture(autouse=True)
    def _helper(self):
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            pytest.skip("this megatron-core has no compiled helper for this Python")

    @pytest.mark.dist
    def test_ranks_of_a_process_group_read_the_same(self, prefix):
        one, other = run_ranks(first_rows, 2, prefix, timeout_s=60)
        assert one == other

    @pytest.fixture
    def prefix(self, tmp_path):
        rng = np.random.default_rng(0)
        texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, 40)) for _ in range(100)]
        build(tmp_path / "a", jsonl(tmp_path / "a.jsonl", texts))
        return tmp_path / "a"

    def test_samples_are_megatron_cores_own(self, prefix, tmp_path):
        found = build_datasets(config_of(prefix), ByteTokenizer())
        assert len(found.train) >= 5 * 4
        sample = found.train[3]
        assert sample["tokens"].shape == (32,)
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert sample["loss_mask"].tolist() == [1.0] * 32
        assert (tmp_path / ".mb-cache" / "indexed").is_dir()
        again = build_datasets(config_of(prefix), ByteTokenizer())
        assert tokens_of(again.train).tolist() == tokens_of(found.train).tolist()

    def test_the_split_is_by_documents_and_leaves_none_in_two_parts(self, prefix):
        overrides = ["dataset.split='60,30,10'"]
        found = build_datasets(config_of(prefix, overrides=overrides), ByteTokenizer())
        whole = documents(prefix)
        texts = [bytes(d[:-1]).decode() for d in whole]
        parts = (found.train, found.valid["validation"], found.test)
        seen = [
            {t for t in texts if t in ByteTokenizer().decode(row.tolist())}
            for part in parts
            for row in [tokens_of(part)]
        ]
        # samples are shuffled, so only documents that lie within one are recognised
        assert not seen[0] & set(texts[60:])
        assert len(found.valid["validation"]) == (30 * 41 - 1) // 32
        assert len(found.test) == (10 * 41 - 1) // 32

    def test_files_are_blended_by_weight(self, tmp_path):
        for name in "ab":
            build(tmp_path / name, jsonl(tmp_path / f"{name}.jsonl", [name * 40] * 60))
        config = config_of(
            tmp_path / "a", tmp_path / "b",
            overrides=["dataset.weights=[1, 3]", "dataset.split='100,0,0'", "train.train_iters=20"],
        )  # fmt: skip
        found = build_datasets(config, ByteTokenizer())
        row = tokens_of(found.train)
        share = (row == ord("b")).sum() / (row != 256).sum()
        assert share == pytest.approx(0.75, abs=0.02)
        assert not found.valid

    def test_validation_sets_have_names(self, prefix):
        overrides = [f"dataset.validation_paths.own={prefix}", "dataset.split='100,0,0'"]
        found = build_datasets(config_of(prefix, overrides=overrides), ByteTokenizer())
        assert list(found.valid) == ["own"]
        assert len(found.valid["own"]) == (100 * 41 - 1) // 32

    def test_documents_can_be_kept_apart(self, prefix):
        from mb_engine.data.loader import read
        from mb_engine.data.samplers import Samples

        overrides = ["dataset.reset_attention_mask=true", "train.micro_batch_size=1"]
        train = build_datasets(config_of(prefix, overrides=overrides), ByteTokenizer()).train
        for i in range(6):
            batch = read(train, Samples(np.array([i]), np.zeros(1, dtype=np.int64)))
            ends = batch["cu_seqlens"].tolist()
            assert ends[0] == 0
            assert ends[-1] == 32
            for end in ends[1:-1]:
                assert batch["tokens"][0, end - 1] == 256

    def test_what_is_missing_or_damaged_is_named(self, prefix, tmp_path, monkeypatch):
        with pytest.raises(DataError, match=r"dataset.path: .*absent.idx does not exist"):
            build_datasets(config_of(tmp_path / "absent"), ByteTokenizer())
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(DataError, match=r"compiled helper.*reinstall its wheel"):
            build_datasets(config_of(prefix), ByteTokenizer())
        monkeypatch.undo()
        tokens = (tmp_path / "a.bin").read_bytes()
        (tmp_path / "a.bin").write_bytes(tokens[:-2])
        with pytest.raises(DataError, match=r"a.bin has 8198 bytes.*damaged or of another build"):
            build_datasets(config_of(prefix), ByteTokenizer())
        (tmp_path / "a.idx").write_bytes(b"no index at all")
        with pytest.raises(DataError, match=r"a.idx is not an index of megatron-core"):
            build_datasets(config_of(prefix), ByteTokenizer())
        build(tmp_path / "a", jsonl(tmp_path / "b.jsonl", ["one"]))
        overrides = ["dataset.split='50,50,0'"]
        with pytest.raises(
            DataError, match=r"has 1 documents, which leaves a part of the split 50, 50, 0"
        ):
            build_datasets(config_of(prefix, overrides=overrides), ByteTokenizer())
