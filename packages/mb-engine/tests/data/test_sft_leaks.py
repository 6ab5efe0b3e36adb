# SPDX-License-Identifier: Apache-2.0
"""Changing one record changes no bit of the loss of another that shares its row."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mb_config.records import ProcessLayout
from mb_engine.data import build_datasets, build_tokenizer
from mb_engine.data.loader import batches
from mb_engine.testing import run_ranks, tiny_config

pytestmark = pytest.mark.dist


def losses(path, packing):
    """Return the losses of the tokens of each sample of a step, by the letter that it begins with."""
    from mb_engine.model.gpt import build_model
    from mb_engine.runtime.distributed import initialize, shutdown
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config(
        "dataset.type=sft", f"dataset.path=['{path}']", f"dataset.packing={packing}",
        "model.num_layers=2", "model.vocab_size=257", "train.micro_batch_size=1",
        "train.global_batch_size=1", "dataset.shuffle=false",
        *(["train.micro_batch_size=4", "train.global_batch_size=4"] if packing == "in_batch" else []),
    ).finalize(1)  # fmt: skip
    layout = initialize(config)
    seed_everything(config.rng, layout)
    (model,) = build_model(config, layout)
    data = build_datasets(config, build_tokenizer(config.tokenizer)).train
    reader = batches(
        data,
        config=config,
        layout=ProcessLayout(device="cpu"),
        consumed_samples=0,
        global_batch_size=lambda _: config.train.global_batch_size,
    )
    from mb_engine.train.objective import LanguageModelObjective
    from mb_engine.train.step import MicroBatchRunner

    batch = next(reader)
    runner = MicroBatchRunner(chunks=[model], layout=layout, objective=LanguageModelObjective())
    (local,) = runner.localize([batch])
    with torch.no_grad():
        found = model(
            local["tokens"], local["position_ids"], None, labels=local["labels"],
            packed_seq_params=local["packed_seq_params"],
        )[0]  # fmt: skip
    shutdown()
    cuts = batch["cu_seqlens"].tolist()[1:-1]
    rows = zip(
        np.split(batch["tokens"][0].numpy(), cuts), np.split(found.numpy(), cuts), strict=True
    )
    return {chr(tokens[0]): values for tokens, values in rows if tokens[0] < 256}


def both(before, after, packing):
    return losses(before, packing), losses(after, packing)


@pytest.mark.parametrize("packing", ["in_batch", "offline"])
def test_another_record_changes_no_bit(tmp_path, packing):
    records = [{"prompt": letter, "completion": letter * 5} for letter in "abcd"]
    paths = []
    for name in ("before", "after"):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(r) + "\n" for r in records))
        records[1]["completion"] = "zyxwv"
    ((before, after),) = run_ranks(both, 1, *map(str, paths), packing)
    assert set(before) == set(after) == set("abcd")
    for letter in "acd":
        assert np.array_equal(before[letter], after[letter]), letter
    assert not np.array_equal(before["b"], after["b"])
