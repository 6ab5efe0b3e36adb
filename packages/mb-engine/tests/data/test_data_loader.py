# SPDX-License-Identifier: Apache-2.0
"""Micro-batches for training and evaluation, from built-in and from custom data sets."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mb_config import ConfigContainer, TextDatasetConfig
from mb_config.records import ProcessLayout
from mb_engine.data import (
    DataError,
    MockDataset,
    TokenWindows,
    build_datasets,
    build_tokenizer,
)
from mb_engine.data.loader import batches, evaluation_batches, evaluation_steps, fetch, sample_order
from mb_engine.data.samplers import SampleOrder, stream
from mb_engine.train.batch_size import BatchSizeSchedule


class Numbers:
    """A custom map-style data set: sample i holds the number i."""

    def __init__(self, size: int, *, mask: bool = True) -> None:
        self.size, self.mask = size, mask

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        assert isinstance(index, int)
        item = {"tokens": np.full(3, index), "scale": torch.tensor(0.5)}
        return item | ({"loss_mask": np.ones(3, dtype=np.float32)} if self.mask else {})


def config(**overrides) -> ConfigContainer:
    made = ConfigContainer()
    made.train.micro_batch_size, made.train.global_batch_size = 2, 4
    made.train.data_parallel_size = 1
    for name, value in overrides.items():
        section, key = name.split("__")
        setattr(getattr(made, section), key, value)
    return made


def training(dataset, made: ConfigContainer, *, consumed: int = 0, dp_rank: int = 0, dp: int = 1):
    return batches(
        dataset,
        config=made,
        layout=ProcessLayout(dp=dp, dp_rank=dp_rank),
        consumed_samples=consumed,
        global_batch_size=lambda _: made.train.global_batch_size,
    )


def order_of(size: int, *, micro: int):
    order = SampleOrder.over(size, batch_size=micro, drop_last=True, shuffle=False, seed=0)
    return stream(
        order, consumed_samples=0, micro_batch_size=micro, global_batch_size=lambda _: micro
    )


def test_a_custom_dataset_is_stacked_into_tensors():
    batch = next(training(Numbers(10), config(dataset__shuffle=False)))
    assert batch["tokens"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert batch["tokens"].dtype == torch.int64
    assert batch["loss_mask"].dtype == torch.float32
    assert batch["scale"].tolist() == [0.5, 0.5]


def test_a_whole_batch_equals_its_samples_one_by_one():
    tokens = np.arange(1000, dtype=np.uint16)
    for dataset in (
        TokenWindows(tokens=tokens, seq_length=7),
        MockDataset(num_samples=50, seq_length=7, vocab_size=31),
    ):
        got = dataset.get_batch(np.array([3, 0, 9]), np.zeros(3, dtype=np.int64))
        for row, index in enumerate((3, 0, 9)):
            for key, values in dataset[index].items():
                np.testing.assert_array_equal(got[key][row], values)
                assert got[key].dtype == values.dtype


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_those_of_the_sample_order(workers):
    made = config(dataset__num_workers=workers)
    order = SampleOrder.over(30, batch_size=4, drop_last=True, shuffle=True, seed=made.rng.seed)
    wanted = stream(
        order, consumed_samples=8, micro_batch_size=2, global_batch_size=lambda _: 4, dp_size=2
    )
    got = training(Numbers(30), made, consumed=8, dp=2)
    for samples, batch in islice(zip(wanted, got, strict=False), 20):
        assert batch["tokens"][:, 0].tolist() == samples.index.tolist()


def test_worker_processes_leave_the_random_state_alone():
    before = torch.get_rng_state()
    batch = next(training(Numbers(30), config(dataset__num_workers=1)))
    assert batch["tokens"].shape == (2, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_in_a_worker_process_comes_out():
    class Broken(Numbers):
        def __getitem__(self, index: int) -> dict:
            raise ValueError(f"sample {index} is broken")

    with pytest.raises(ValueError, match="sample 0 is broken"):
        next(fetch(Broken(8), order_of(8, micro=2), num_workers=1))


def test_two_runs_with_one_seed_read_the_same_and_another_seed_reads_otherwise():
    def first(seed: int) -> list:
        made = config(rng__seed=seed)
        return [b["tokens"][:, 0].tolist() for b in islice(training(Numbers(99), made), 20)]

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_samples_of_different_shape_are_refused_by_name():
    class Ragged(Numbers):
        def __getitem__(self, index: int) -> dict:
            return {"tokens": np.zeros(index + 1)}

    with pytest.raises(DataError, match=r"Ragged differ in the shape of 'tokens': \(1,\), \(2,\)"):
        next(training(Ragged(8), config(dataset__shuffle=False)))


class TestDataloaderType:
    def test_single_reads_the_data_as_it_lies(self):
        made = config(dataset__dataloader_type="single", train__train_iters=2)
        got = islice(training(Numbers(8), made), 4)
        assert [b["tokens"][:, 0].tolist() for b in got] == [[0, 1], [2, 3], [4, 5], [6, 7]]

    def test_single_refuses_a_second_pass_before_the_first_step(self):
        made = config(dataset__dataloader_type="single", train__train_iters=3)
        with pytest.raises(DataError, match=r"reads the 9 training .* 8 of them .* needs 12"):
            training(Numbers(9), made)

    def test_a_pass_in_whole_batches_is_one_epoch(self):
        for kind, drop, expected in (
            ("single", False, 8),
            ("cyclic", True, 8),
            ("cyclic", False, 9),
        ):
            made = config(dataset__dataloader_type=kind, dataset__drop_last=drop)
            assert sample_order(made, 9).epoch_size == expected

    def test_cyclic_goes_on_with_a_new_order(self):
        got = islice(training(Numbers(8), config()), 8)
        seen = [b["tokens"][:, 0].tolist() for b in got]
        epochs = [np.concatenate(part).tolist() for part in (seen[:4], seen[4:])]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(8))
        assert epochs[0] != epochs[1]

    def test_cyclic_without_shuffling_repeats_the_order(self):
        got = islice(training(Numbers(4), config(dataset__shuffle=False)), 4)
        assert [b["tokens"][:, 0].tolist() for b in got] == [[0, 1], [2, 3], [0, 1], [2, 3]]


def cover(size: int, batch: int, micro: int, dp: int, **kwargs) -> tuple[list[int], set[int]]:
    """Return the unmasked samples that all ranks see in one evaluation, and their step counts."""
    seen: list[int] = []
    counts = set()
    for rank in range(dp):
        steps = list(
            evaluation_batches(
                Numbers(size),
                batch_size=batch,
                micro_batch_size=micro,
                dp_rank=rank,
                dp_size=dp,
                **kwargs,
            )
        )
        counts.add(len(steps))
        for step in steps:
            assert len(step) == batch // (micro * dp)
            for micro_batch in step:
                assert micro_batch["tokens"].shape == (micro, 3)
                kept = micro_batch["loss_mask"].bool()
                assert bool((kept.all(1) | ~kept.any(1)).all())
                seen += micro_batch["tokens"][kept.any(1), 0].tolist()
    return seen, counts


class TestEvaluation:
    @given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]))
    def test_covers_each_sample_exactly_once(self, size, count, micro, dp):
        seen, counts = cover(size, count * micro * dp, micro, dp)
        assert sorted(seen) == list(range(size))
        assert counts == {-(-size // (count * micro * dp))}

    def test_ends_after_the_steps_asked_for(self):
        assert cover(60, 4, 2, 2, max_steps=3) == (
            [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11],
            {3},
        )

    def test_never_reads_a_sample_twice_to_fill_the_steps_asked_for(self):
        seen, counts = cover(10, 4, 2, 2, max_steps=100)
        assert sorted(seen) == list(range(10))
        assert counts == {3}

    def test_leaves_the_mask_of_the_dataset_alone(self):
        dataset = MockDataset(num_samples=3, seq_length=4, vocab_size=9)
        [[_, padded]] = evaluation_batches(dataset, batch_size=4, micro_batch_size=2)
        assert padded["loss_mask"].sum(1).tolist() == [4.0, 0.0]
        assert dataset[2]["loss_mask"].sum() == 4

    def test_needs_a_mask_only_to_fill_up(self):
        whole = evaluation_batches(Numbers(4, mask=False), batch_size=2, micro_batch_size=1)
        assert len(list(whole)) == 2
        part = evaluation_batches(Numbers(5, mask=False), batch_size=2, micro_batch_size=1)
        with pytest.raises(DataError, match="Numbers has no 'loss_mask'"):
            list(part)

    def test_an_empty_dataset_is_refused(self):
        with pytest.raises(DataError, match="no samples"):
            list(evaluation_batches(Numbers(0), batch_size=2, micro_batch_size=1))

    def test_follows_the_configuration(self):
        def counted(**overrides) -> tuple[int, int, int]:
            steps = list(
                evaluation_steps(Numbers(40), config=config(**overrides), layout=ProcessLayout())
            )
            return len(steps), len(steps[0]), len(steps[0][0]["tokens"])

        assert counted() == (10, 2, 2)
        assert counted(validation__eval_iters=3) == (3, 2, 2)
        assert counted(validation__eval_iters=3, validation__full_validation=True) == (10, 2, 2)
        assert counted(validation__eval_global_batch_size=8) == (5, 4, 2)
        assert counted(validation__eval_micro_batch_size=4) == (10, 1, 4)


def test_a_finalized_configuration_feeds_two_ranks_the_same_order_as_one(tmp_path):
    (tmp_path / "t.txt").write_text("".join(map(chr, range(32, 127))) * 20)
    made = ConfigContainer(dataset=TextDatasetConfig(path=[str(tmp_path / "t.txt")]))
    made.model.num_layers, made.model.hidden_size, made.model.num_attention_heads = 1, 8, 1
    made.model.vocab_size, made.model.seq_length = 257, 16
    made.train.train_iters, made.train.global_batch_size = 10, 16
    made.train.rampup_batch_size = [4, 4, 50]
    tokenizer = build_tokenizer(made.tokenizer)

    def read(world: int, consumed: int = 0) -> list[list[int]]:
        resolved = made.finalize(world)
        sizes = BatchSizeSchedule.from_config(resolved)
        train = build_datasets(resolved, tokenizer).train
        ranks = [
            batches(
                train,
                config=resolved,
                layout=ProcessLayout(dp=world, dp_rank=rank),
                consumed_samples=consumed,
                global_batch_size=sizes.global_batch_size,
            )
            for rank in range(world)
        ]
        rows: list[list[int]] = []
        while consumed < sizes.samples_at_iteration(resolved.train.train_iters):
            for _ in range(sizes.num_microbatches(consumed)):
                rows += [row for rank in ranks for row in next(rank)["tokens"].tolist()]
            consumed += sizes.global_batch_size(consumed)
        return rows

    whole = read(1)
    assert len(whole) == BatchSizeSchedule.from_config(made.finalize(1)).samples_at_iteration(10)
    assert read(2) == whole
    assert read(4, consumed=12) == whole[12:]
