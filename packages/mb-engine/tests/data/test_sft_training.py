# SPDX-License-Identifier: Apache-2.0
"""SFT data in training: packed as unpacked, resumed anywhere, counted right, balanced over ranks.

Tolerances: packed and unpacked differ by the order of float32 additions, a few roundings of 6e-8
relative; 1e-5 leaves room for some hundred of them.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from mb_config.records import ProcessLayout
from mb_engine import Engine
from mb_engine.data import build_datasets, build_tokenizer
from mb_engine.data.loader import batches, evaluation_steps
from mb_engine.testing import run_ranks, tiny_config

SAMPLES = 24
TP = ["model.tensor_model_parallel_size=2"]
SP = [*TP, "model.sequence_parallel=true"]
PP = ["model.pipeline_model_parallel_size=2"]
CP = ["model.context_parallel_size=2"]
FULL = [
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
]
LAYOUTS = {
    "one rank": (1, []),
    "recomputed": (1, FULL),
    "TP2": (2, TP),
    "TP2 + SP": (2, SP),
    "PP2": (2, PP),
    "PP2, interleaved": (2, [*PP, "model.virtual_pipeline_model_parallel_size=2"]),
    "CP2": (2, CP),
    "CP2, all_gather": (2, [*CP, "model.cp_comm_type=all_gather"]),
    "DP2": (2, []),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Prompts and completions of many lengths, up to the longest that fits."""
    rng = np.random.default_rng(5)
    file = tmp_path_factory.mktemp("sft") / "train.jsonl"
    with file.open("w") as out:
        for i in range(SAMPLES):
            size = int(min(27, 3 + rng.lognormal(1.8, 0.8)))
            letters = "".join(chr(97 + c) for c in rng.integers(0, 26, size))
            record = {
                "prompt": f"{i:02d}{letters[: size // 3]}",
                "completion": letters[size // 3 :],
            }
            out.write(json.dumps(record) + "\n")
    return file


def config_of(path, packing, *overrides):
    return tiny_config(
        "dataset.type=sft", f"dataset.path=['{path}']", f"dataset.packing={packing}",
        "model.num_layers=4", "model.vocab_size=null", "train.micro_batch_size=1",
        "train.train_iters=3", "optimizer.lr=3e-3", "optimizer.adam_eps=1e-5",
        "scheduler.lr_decay_style=constant", *overrides,
    )  # fmt: skip


def resolved(path, packing, *overrides, world=1):
    config = config_of(path, packing, "model.vocab_size=257", *overrides)
    return config.finalize(world)


def step_reader(config, layout, consumed=0):
    """Return the data of *config*, and an iterator over steps: lists of micro-batches."""
    from mb_engine.train.batch_size import BatchSizeSchedule

    data = build_datasets(config, build_tokenizer(config.tokenizer)).train
    sizes = BatchSizeSchedule.from_config(config)
    wanted = batches(
        data,
        config=config,
        layout=layout,
        consumed_samples=consumed,
        global_batch_size=sizes.global_batch_size,
    )
    count = sizes.num_microbatches(0)
    return data, iter(lambda: list(itertools.islice(wanted, count)), [])


def train(path, packing, overrides, steps=2):
    """Train on this rank; return losses, gradient norms, counters, and on one rank gradients."""
    engine = Engine.from_config(config_of(path, packing, "model.vocab_size=257", *overrides))
    _, steps_of_data = step_reader(engine.config, engine.layout)
    losses, norms, gradients = [], [], {}
    for _ in range(steps):
        losses.append(float(engine.forward_backward(next(steps_of_data)).loss))
        if not gradients:
            gradients = {
                name: p.main_grad.clone() for m in engine.model for name, p in m.named_parameters()
            }
        norms.append(engine.optimizer_step().grad_norm)
    counted = (engine.progress.consumed_samples, engine.progress.consumed_tokens)
    engine.close()
    return losses, norms, counted, gradients


def train_all(path, cases):
    return [train(path, packing, overrides) for packing, overrides in cases]


IN_BATCH = ["train.global_batch_size=24", "train.micro_batch_size=6"]
EACH = ["train.global_batch_size=24", "train.micro_batch_size=1"]


@pytest.fixture(scope="module")
def offline_rows(path):
    """How many rows offline packing makes for CP2, and how many without."""
    return {
        multiple: len(
            build_datasets(
                resolved(path, "offline", *EACH, f"dataset.pad_to_multiple={multiple}"),
                build_tokenizer(resolved(path, "none").tokenizer),
            ).train
        )
        for multiple in (1, 4)
    }


def cases_of(layout, rows):
    """Return the same step in both ways to pack it; one step holds the whole data."""
    cp = any("context" in o for o in layout)
    n = rows[4 if cp else 1]
    offline = [
        f"train.global_batch_size={n}", "train.micro_batch_size=1", "dataset.shuffle=false",
    ]  # fmt: skip
    return [
        ("in_batch", [*IN_BATCH, *layout]),
        ("offline", [*offline, *layout]),
    ]


@pytest.fixture(scope="module")
def results(path, offline_rows):
    """By layout: what the last rank saw of each way; of padded samples, on one rank."""
    padded = run_ranks(train_all, 1, str(path), [("none", EACH)])[0]
    seen = {}
    for ranks in (1, 2):
        names = [name for name, (n, _) in LAYOUTS.items() if n == ranks]
        cases = [case for name in names for case in cases_of(LAYOUTS[name][1], offline_rows)]
        found = run_ranks(train_all, ranks, str(path), cases, timeout_s=280)[-1]
        for i, name in enumerate(names):
            ways = found[2 * i : 2 * i + 2]
            seen[name] = dict(zip(("in_batch", "offline"), ways, strict=True))
    seen["one rank"]["none"] = padded[0]
    return seen


pytestmark = pytest.mark.dist


class TestPackedTrainsAsUnpacked:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_losses_and_gradient_norms_are_those_of_padded_samples(self, results, name):
        expected_losses, expected_norms, expected_counts, _ = results["one rank"]["none"]
        losses, norms, counts, _ = results[name]["in_batch"]
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        assert norms[0] == pytest.approx(expected_norms[0], rel=1e-5)
        assert counts == expected_counts
        assert expected_losses[1] < expected_losses[0]

    def test_each_gradient_is_that_of_padded_samples(self, results):
        expected = results["one rank"]["none"][3]
        for name in ("one rank", "recomputed"):
            gradients = results[name]["in_batch"][3]
            assert gradients.keys() == expected.keys()
            for key, gradient in gradients.items():
                scale = float(expected[key].abs().max())
                assert scale > 0
                assert float((gradient - expected[key]).abs().max()) <= 1e-5 * scale, key

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_rows_packed_beforehand_train_so_too(self, results, name):
        """One step has all rows, and so all samples, however they are packed."""
        expected_losses, expected_norms, (_, expected_tokens), _ = results["one rank"]["none"]
        losses, norms, (_, tokens), _ = results[name]["offline"]
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        assert norms[0] == pytest.approx(expected_norms[0], rel=1e-5)
        assert tokens == expected_tokens


def steps_of(config, ranks, steps, consumed=0):
    """Return the samples of each step as texts, sorted, over all ranks; and who read how much."""
    from mb_engine.data.tokenizers import ByteTokenizer

    texts = [[] for _ in range(steps)]
    counted = [[] for _ in range(steps)]
    for rank in range(ranks):
        layout = ProcessLayout(rank=rank, world_size=ranks, dp=ranks, dp_rank=rank, device="cpu")
        _, reader = step_reader(config, layout, consumed)
        for step in range(steps):
            mine = next(reader)
            counted[step].append(
                [(int(b["global_samples"]), int(b["global_tokens"])) for b in mine]
            )
            for b in mine:
                ends = b["cu_seqlens"].tolist() if "cu_seqlens" in b else None
                rows = b["tokens"] if ends is None else np.split(b["tokens"][0], ends[1:-1])
                found = [ByteTokenizer().decode(r.tolist()) for r in rows]
                texts[step] += [text for text in found if text]
    return [sorted(t) for t in texts], counted


class TestResuming:
    @pytest.mark.parametrize("packing", ["none", "in_batch", "offline"])
    def test_goes_on_where_it_stopped_with_any_number_of_ranks(self, path, packing):
        size = 4
        base = [f"train.global_batch_size={size}", "dataset.drop_last=false"]
        whole, _ = steps_of(resolved(path, packing, *base), 1, 6)
        for ranks in (1, 2, 4):
            config = resolved(path, packing, *base, world=ranks)
            again, counted = steps_of(config, ranks, 4, consumed=2 * size)
            assert again == whole[2:], ranks
            for step in counted:
                assert all(rank == step[0] for rank in step), "all ranks count alike"
                assert sum(samples for samples, _ in step[0]) == size

    @pytest.mark.parametrize("packing", ["none", "in_batch", "offline"])
    def test_an_epoch_has_each_sample_once(self, path, packing):
        rows = 24
        if packing == "offline":
            rows = len(
                build_datasets(
                    resolved(path, packing, *EACH),
                    build_tokenizer(resolved(path, packing, *EACH).tokenizer),
                ).train
            )
        config = resolved(path, packing, f"train.global_batch_size={rows}")
        (texts,), _ = steps_of(config, 1, 1)
        assert sorted(t[:2] for t in texts) == [f"{i:02d}" for i in range(24)]


class TestRows:
    def test_tokens_counted_are_real_ones(self, path):
        config = resolved(
            path, "in_batch", "train.global_batch_size=24", "train.micro_batch_size=6"
        )
        texts, counted = steps_of(config, 1, 1)
        with path.open() as file:
            records = [json.loads(line) for line in file]
        # the end of the document is predicted and so is no token that the model is given
        expected = sum(len(r["prompt"] + r["completion"]) for r in records)
        assert sum(tokens for _, tokens in counted[0][0]) == expected
        assert sum(map(len, texts[0])) == expected

    @pytest.mark.parametrize("packing", ["in_batch", "offline"])
    def test_boundaries_cover_the_row_and_filling_does_not_count(self, path, packing):
        config = resolved(path, packing, "train.global_batch_size=4", "dataset.pad_to_multiple=4")
        layout = ProcessLayout(rank=0, world_size=1, device="cpu")
        data, reader = step_reader(config, layout)
        for batch in next(reader):
            ends = batch["cu_seqlens"]
            assert ends[0] == 0
            assert ends[-1] == batch["tokens"].shape[1]
            lengths = ends.diff()
            assert (lengths % 4 == 0).all()
            assert lengths.max() <= batch["max_seqlen"]
            for a, b in itertools.pairwise(ends.tolist()):
                assert batch["position_ids"][0, a:b].tolist() == list(range(b - a))
            filling = batch["tokens"] == data.pad_id
            assert not batch["loss_mask"][filling].any()
            assert batch["loss_mask"].sum() > 0

    def test_labels_are_what_follows(self, path):
        config = resolved(path, "none", "train.global_batch_size=4")
        _, reader = step_reader(config, ProcessLayout(rank=0, world_size=1, device="cpu"))
        for batch in next(reader):
            tokens, labels, mask = (batch[k][0] for k in ("tokens", "labels", "loss_mask"))
            n = int((tokens != 256).sum())
            assert torch.equal(labels[: n - 1], tokens[1:n])
            assert labels[n - 1] == 256
            learnt = int(mask.sum())
            assert mask[n - learnt : n].all(), "the completion and its end"

    def test_all_rows_of_a_step_are_equally_long(self, path):
        config = resolved(
            path, "in_batch", "train.global_batch_size=12", "train.micro_batch_size=3", world=2
        )
        widths = set()
        for rank in range(2):
            layout = ProcessLayout(rank=rank, world_size=2, dp=2, dp_rank=rank, device="cpu")
            _, reader = step_reader(config, layout)
            widths |= {b["tokens"].shape for b in next(reader)}
        assert len(widths) == 1

    def test_loader_processes_read_the_same(self, path):
        layout = ProcessLayout(rank=0, world_size=1, device="cpu")
        found = []
        for workers in (0, 1):
            config = resolved(
                path, "in_batch", "train.global_batch_size=4", f"dataset.num_workers={workers}"
            )
            found.append(next(step_reader(config, layout)[1]))
        for a, b in zip(*found, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)

    @pytest.mark.parametrize("packing", ["none", "in_batch", "offline"])
    def test_evaluation_reads_each_sample_once(self, path, packing):
        config = resolved(
            path, packing, "train.global_batch_size=4", f"dataset.validation_paths.v={path}",
            "validation.full_validation=true",
        )  # fmt: skip
        data = build_datasets(config, build_tokenizer(config.tokenizer)).valid["v"]
        layout = ProcessLayout(rank=0, world_size=1, device="cpu")
        learnt = sum(
            int(b["loss_mask"].sum())
            for step in evaluation_steps(data, config=config, layout=layout)
            for b in step
        )
        assert learnt == sum(s["loss_tokens"] for s in data.store.report["sources"])


def pretrain_on(path, packing, overrides):
    from mb_engine import pretrain

    config = config_of(
        path, packing, "dataset.split='70,30,0'", "validation.eval_interval=2", *overrides
    )
    result = pretrain(config)
    event = result.evaluations["validation"]
    return result.state.consumed_samples, result.state.consumed_tokens, event.num_tokens, event.loss


def pretrain_all(path, cases):
    return [pretrain_on(path, *case) for case in cases]


def operations_per_token(path):
    """Return what a run reports, and the formula for its samples and for whole rows."""
    from mb_config.records import StepEvent
    from mb_engine import pretrain
    from mb_engine.model.flops import flops_per_token

    seen = []

    class Record:
        def on_event(self, event):
            if isinstance(event, StepEvent):
                seen.append(event.tflops_per_device * 1e12 / event.tokens_per_second)

    overrides = ["train.global_batch_size=2", "dataset.split='100,0,0'", "model.vocab_size=257"]
    config = config_of(path, "offline", *overrides)
    pretrain(config, callbacks=[Record()])
    config = config.finalize(1)
    data = build_datasets(config, build_tokenizer(config.tokenizer)).train
    return seen[-1], flops_per_token(config, data.sample_lengths()), flops_per_token(config)


class TestWholeRuns:
    def test_reported_operations_are_of_samples_and_not_of_whole_rows(self, path):
        ((reported, of_samples, of_rows),) = run_ranks(operations_per_token, 1, str(path))
        assert reported == pytest.approx(of_samples, rel=1e-6)
        assert of_samples < of_rows

    def test_train_and_evaluate_on_two_ranks(self, path):
        cases = [
            ("none", ["train.global_batch_size=4"]),
            ("in_batch", ["train.global_batch_size=4", "train.micro_batch_size=2"]),
            ("offline", ["train.global_batch_size=2"]),
        ]
        found = run_ranks(pretrain_all, 2, str(path), cases)
        assert found[0] == found[1]
        data = build_datasets(
            resolved(
                path, "none", "dataset.split='70,30,0'", *EACH[1:], "train.global_batch_size=1"
            ),
            build_tokenizer(resolved(path, "none").tokenizer),
        )
        expected = sum(s["loss_tokens"] for s in data.valid["validation"].store.report["sources"])
        for (packing, _), (samples, tokens, evaluated, loss) in zip(cases, found[0], strict=True):
            assert samples == 3 * (2 if packing == "offline" else 4)
            assert 0 < tokens < samples * 32 + 1
            assert evaluated == expected, packing
            assert 4 < loss < 6
        padded, packed = found[0][:2]
        assert packed[:3] == padded[:3], "the same samples, so the same tokens"
        assert packed[3] == pytest.approx(padded[3], abs=1e-5)
