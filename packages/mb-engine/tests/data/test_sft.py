# SPDX-License-Identifier: Apache-2.0
"""SFT records to samples: loss masks against transformers, truncation, broken records, mixtures."""

from __future__ import annotations

import gzip
import json
import logging

import numpy as np
import pytest
from chat_styles import STYLES, save_tokenizer
from mb_engine.data import DataError, build_datasets, build_tokenizer
from mb_engine.data.chat import load_chat_template
from mb_engine.data.sft import Counts, SampleMaker
from mb_engine.data.sft_prepare import mix
from mb_engine.data.tokenizers import ByteTokenizer
from mb_engine.testing import tiny_config

TURNS = [
    {"role": "user", "content": "what is two and two?"},
    {"role": "assistant", "content": "four, said the cat"},
    {"role": "user", "content": "and the mat?"},
    {"role": "assistant", "content": "it is the other é"},
]


def config_of(*overrides):
    sizes = ("model.seq_length=64", "train.micro_batch_size=1", "train.global_batch_size=1")
    return tiny_config("dataset.type=sft", *sizes, *overrides).finalize(1)


def jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def pairs(count, size=8):
    return [{"prompt": f"{i:04d}"[-4:], "completion": "x" * (1 + i % size)} for i in range(count)]


def stored(config, tokenizer=None):
    """Return the ids and marks of all samples of the training set."""
    store = build_datasets(config, tokenizer or ByteTokenizer()).train.store
    cuts = store.samples[1:-1]
    return list(zip(np.split(store.ids, cuts), np.split(store.learnt, cuts), strict=True)), store


@pytest.fixture(scope="module", params=STYLES)
def made(request, tmp_path_factory):
    """A maker, and transformers' tokenizer with the same template, its answers marked."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("masks")
    save_tokenizer(folder / "plain", request.param)
    save_tokenizer(folder / "tagged", request.param, tagged=True)
    config = config_of(
        "tokenizer.tokenizer_type=huggingface", f"tokenizer.tokenizer_model={folder / 'plain'}"
    )
    maker = SampleMaker(
        settings=config.dataset,
        tokenizer=build_tokenizer(config.tokenizer),
        template=load_chat_template(config.tokenizer),
    )
    return maker, transformers.AutoTokenizer.from_pretrained(folder / "tagged")


class TestLossMasks:
    def test_are_those_of_transformers(self, made):
        maker, oracle = made
        sample = maker.make({"messages": TURNS})
        expected = oracle.apply_chat_template(
            TURNS, return_dict=True, return_assistant_tokens_mask=True
        )
        assert sample.ids.tolist() == expected["input_ids"]
        assert sample.learnt.astype(int).tolist() == expected["assistant_masks"]
        assert 0 < sample.learnt.sum() < len(sample.ids)

    def test_of_the_last_turn_are_those_of_the_last_answer(self, made):
        maker, oracle = made
        every = maker.make({"messages": TURNS}).learnt
        maker.settings.loss_on = "last_turn"
        sample = maker.make({"messages": TURNS})
        maker.settings.loss_on = "assistant"
        text = oracle.decode(sample.ids[sample.learnt])
        assert "it is the other é" in text
        assert "cat" not in text
        assert (every & ~sample.learnt).any()


class TestChoices:
    def maker(self, tmp_path, *overrides):
        template = tmp_path / "roles.jinja"
        template.write_text(
            "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
            "{% if tools %}{{ tools[0].name }}{% endif %}"
            "{% if add_generation_prompt %}a:{% endif %}"
        )
        config = config_of(f"tokenizer.chat_template={template}", *overrides)
        return SampleMaker(
            settings=config.dataset,
            tokenizer=ByteTokenizer(),
            template=load_chat_template(config.tokenizer),
        )

    CALLS = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "two"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "three"},
    )

    @pytest.mark.parametrize(
        ("loss_on", "learnt"),
        [
            ("assistant", "one;two;three;"),
            ("completion", "two;three;"),
            ("last_turn", "three;"),
            ("all", "u:q;a:one;u:r;a:two;t:t;a:three;"),
        ],
    )
    def test_loss_is_on_what_was_asked_for(self, tmp_path, loss_on, learnt):
        maker = self.maker(tmp_path, f"dataset.loss_on={loss_on}")
        sample = maker.make({"messages": list(self.CALLS)})
        assert ByteTokenizer().decode(sample.ids[sample.learnt]) == learnt

    def test_tools_are_rendered_from_lists_and_from_json(self, tmp_path):
        maker = self.maker(tmp_path, "dataset.loss_on=all")
        for tools in ([{"name": "add"}], '[{"name": "add"}]'):
            sample = maker.make({"messages": list(self.CALLS), "tools": tools})
            assert ByteTokenizer().decode(sample.ids).endswith("add")

    def test_completions_end_with_the_end_of_the_document(self, tmp_path):
        sample = self.maker(tmp_path).make({"prompt": "ab", "completion": "cd"})
        assert sample.ids.tolist() == [*b"abcd", 256]
        assert sample.learnt.tolist() == [False, False, True, True, True]
        maker = self.maker(tmp_path, "dataset.append_eod=false", "dataset.loss_on=all")
        sample = maker.make({"prompt": "ab", "completion": "cd"})
        assert sample.ids.tolist() == [*b"abcd"]
        assert sample.learnt.all()

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            ({"prompt": "a"}, r"field 'completion' is missing \(fields: prompt\)"),
            ({"prompt": 3, "completion": ""}, r"field 'prompt' is a int, not text"),
            ({"messages": []}, r"not a list with at least one"),
            ({"messages": [{"content": "a"}]}, r"message 1 is not an object with a role"),
            ({"messages": [{"role": "user"}]}, r"message 1 has neither content nor tool_calls"),
            ({"messages": [{"role": "u", "content": ""}], "tools": "{"}, r"tools are not JSON"),
        ],
    )
    def test_what_is_wrong_with_a_record_is_said(self, tmp_path, record, reason):
        with pytest.raises(DataError, match=reason):
            self.maker(tmp_path).make(record)

    def test_a_chat_needs_a_template(self):
        maker = SampleMaker(settings=config_of().dataset, tokenizer=ByteTokenizer())
        with pytest.raises(DataError, match=r"no chat template; give one in tokenizer.chat_templ"):
            maker.make({"messages": list(self.CALLS)})


class TestTruncation:
    def fitted(self, how, prompt="p" * 40, completion="c" * 40):
        maker = SampleMaker(
            settings=config_of(f"dataset.truncation={how}").dataset, tokenizer=ByteTokenizer()
        )
        counts = Counts()
        made = maker.make({"prompt": prompt, "completion": completion})
        return maker.fit(made, counts), counts

    def test_right_cuts_the_end(self):
        sample, counts = self.fitted("right")
        assert ByteTokenizer().decode(sample.ids) == "p" * 40 + "c" * 25
        assert (counts.truncated, counts.tokens, counts.loss_tokens) == (1, 64, 25)

    def test_left_cuts_the_beginning(self):
        sample, counts = self.fitted("left")
        assert ByteTokenizer().decode(sample.ids) == "p" * 24 + "c" * 40
        assert (counts.truncated, counts.tokens, counts.loss_tokens) == (1, 64, 41)

    def test_skip_leaves_it_out(self):
        sample, counts = self.fitted("skip")
        assert sample is None
        assert (counts.too_long, counts.samples, counts.tokens) == (1, 0, 0)

    def test_error_refuses_it(self):
        with pytest.raises(DataError, match=r"80 tokens are more than dataset.seq_length=64"):
            self.fitted("error")

    def test_a_sample_without_anything_to_learn_is_left_out(self):
        sample, counts = self.fitted("right", prompt="p" * 70)
        assert sample is None
        assert (counts.nothing_learnt, counts.truncated) == (1, 0)

    def test_one_that_just_fits_is_whole(self):
        sample, counts = self.fitted("error", "p" * 40, "c" * 24)
        assert len(sample.ids) == 65
        assert counts.truncated == 0


class TestFiles:
    def test_jsonl_its_compressed_form_and_parquet_give_the_same(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        records = pairs(7)
        plain = jsonl(tmp_path / "a.jsonl", records)
        with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
            file.write(plain.read_bytes())
        parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
        found = [
            [ids.tolist() for ids, _ in stored(config_of(f"dataset.path=['{tmp_path / n}']"))[0]]
            for n in ("a.jsonl", "a.jsonl.gz", "a.parquet")
        ]
        assert found[0] == [[*f"{i:04d}".encode(), *b"x" * (1 + i), 256] for i in range(7)]
        assert found[0] == found[1] == found[2]

    def test_messages_of_parquet_have_no_fields_without_a_value(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        from mb_engine.data.records import read_records
        from pyarrow import parquet

        rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "name": "n"}]}]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        (record,) = read_records(str(tmp_path / "a.parquet"))
        assert record.value == rows[0]

    BROKEN = b'{"prompt": "a", "completion": "b"}\n{"prompt": \n\n[1]\n\xff\n{"prompt": "c"}\n'

    @pytest.mark.parametrize(
        ("keep", "reason"),
        [
            (2, r"a.jsonl, line 2: not JSON \(Expecting value"),
            (4, r"a.jsonl, line 2: not JSON"),
        ],
    )
    def test_the_first_broken_line_is_named(self, tmp_path, keep, reason):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\n".join(self.BROKEN.split(b"\n")[:keep]))
        with pytest.raises(DataError, match=reason + r".*dataset.bad_records=skip"):
            stored(config_of(f"dataset.path=['{path}']"))

    def test_broken_lines_are_skipped_and_counted_where_asked(self, tmp_path, caplog):
        path = tmp_path / "a.jsonl"
        path.write_bytes(self.BROKEN)
        with caplog.at_level(logging.INFO, logger="mb_engine"):
            samples, store = stored(
                config_of(f"dataset.path=['{path}']", "dataset.bad_records=skip")
            )
        assert len(samples) == 1
        (source,) = store.report["sources"]
        assert (source["records"], source["bad"], source["samples"]) == (5, 4, 1)
        lines = [text.split(": ", 1) for text in store.report["bad_records"]]
        assert [where.split(", ")[1] for where, _ in lines] == [
            "line 2",
            "line 4",
            "line 5",
            "line 6",
        ]
        assert lines[1][1] == "a JSON list, not an object"
        assert lines[2][1] == "not UTF-8 at byte 0 of the line"
        assert "bad 4" in caplog.text

    @pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
    def test_missing_empty_and_damaged_files_are_named(self, tmp_path, name):
        path = tmp_path / name
        config = config_of(f"dataset.path=['{path}']")
        with pytest.raises(DataError, match=rf"{name} does not exist"):
            stored(config)
        path.write_bytes(b"\n" if name.endswith("l") else b"PAR1 damaged")
        with pytest.raises(DataError, match=rf"{name} (is empty|cannot be read)"):
            stored(config)

    def test_no_sample_left_says_what_became_of_them(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", [{"prompt": "p" * 99, "completion": "c"}])
        with pytest.raises(DataError, match=r"no sample is left.*records 1.*nothing learnt 1"):
            stored(config_of(f"dataset.path=['{path}']"))


class TestPrepared:
    def test_is_read_again_until_something_changes(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", pairs(20))
        cache = tmp_path / "cache"
        base = [f"dataset.path=['{path}']", f"dataset.cache_dir={cache}"]

        def folders(*overrides, tokenizer=None):
            stored(config_of(*base, *overrides), tokenizer)
            return {p.name for p in cache.iterdir() if p.is_dir()}

        first = folders()
        (only,) = first
        when = (cache / only / "samples.parquet").stat().st_mtime_ns
        assert folders() == first
        assert folders("dataset.shuffle=false", "optimizer.lr=1") == first
        assert (cache / only / "samples.parquet").stat().st_mtime_ns == when
        seen = first
        for change in (
            ["dataset.loss_on=all"],
            ["dataset.packing=offline"],
            ["dataset.packing=offline", "dataset.pad_to_multiple=2"],
            ["model.seq_length=32"],
            ["dataset.split='50,50,0'"],
            ["dataset.append_eod=false"],
        ):
            now = folders(*change)
            assert now > seen, change
            seen = now
        jsonl(path, pairs(21))
        assert folders() > seen

    def test_a_damaged_cache_says_what_to_remove(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", pairs(3))
        config = config_of(f"dataset.path=['{path}']")
        stored(config)
        (file,) = (tmp_path / ".mb-cache").glob("*/samples.parquet")
        file.write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"sft-.* holds no readable prepared data.*remove"):
            stored(config)

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", pairs(3))
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match=r"cannot be written to .*dataset.cache_dir"):
            stored(config_of(f"dataset.path=['{path}']", f"dataset.cache_dir={tmp_path / 'file'}"))

    def test_parts_of_a_split_share_no_record_and_leave_none_out(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", pairs(200, size=3))
        found = build_datasets(
            config_of(f"dataset.path=['{path}']", "dataset.split='80,15,5'"), ByteTokenizer()
        )
        parts = [found.train, found.valid["validation"], found.test]
        texts = [
            bytes(part[i]["tokens"][:4].astype(np.uint8))
            for part in parts
            for i in range(len(part))
        ]
        assert sorted(texts) == sorted(f"{i:04d}".encode() for i in range(200))
        assert len(parts[0]) > len(parts[1]) > len(parts[2]) > 0


class TestMixtures:
    def test_shares_are_as_the_weights(self):
        parts = mix([100, 10, 50], [1, 1, 2], seed=3)
        assert [len(p) for p in parts] == [40, 40, 80]
        assert sorted(parts[1]) == sorted([*range(10)] * 4)
        assert len(set(parts[0])) == 40
        assert np.bincount(parts[2]).min() == 1
        assert np.bincount(parts[2]).max() == 2

    def test_without_weights_each_sample_is_read_once(self):
        assert [p.tolist() for p in mix([2, 3], None, seed=0)] == [[0, 1], [0, 1, 2]]

    def test_what_cannot_be_mixed_is_refused(self):
        with pytest.raises(DataError, match=r"positive number for each of the 2 entries"):
            mix([1, 1], [1], seed=0)
        with pytest.raises(DataError, match=r"entry 2 of dataset.path has a weight but no samples"):
            mix([1, 0], [1, 1], seed=0)

    def test_an_epoch_of_weighted_files_has_both(self, tmp_path):
        a = jsonl(tmp_path / "a.jsonl", pairs(30))
        b = jsonl(tmp_path / "b.jsonl", [{"prompt": "b", "completion": "y"}] * 10)
        samples, store = stored(config_of(f"dataset.path=['{a}', '{b}']", "dataset.weights=[1, 3]"))
        of_b = sum(bytes(ids[:1].astype(np.uint8)) == b"b" for ids, _ in samples)
        assert (len(samples), of_b) == (40, 30)
        assert [s["samples_of_an_epoch"] for s in store.report["sources"]] == [10, 30]
