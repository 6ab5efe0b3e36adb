# SPDX-License-Identifier: Apache-2.0
"""Recipes are the published models, and fit the GPUs that they are for."""

from __future__ import annotations

import json
import math

import pytest
from mb_engine import cli
from mb_engine.bridge.config import config_to_hf, mismatches, model_from_hf
from mb_engine.bridge.family import family
from mb_engine.errors import EngineError
from mb_engine.recipes import pretrain, recipe, recipes, sft
from mb_engine.recipes.catalogue import load_recipe
from mb_engine.recipes.command import planned
from mb_engine.recipes.published import PUBLISHED

MADE_UP = ("dataset.type=mock", "tokenizer.tokenizer_model=made-up")


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_model_has_as_many_parameters_as_its_makers_weights(model):
    table = family(PUBLISHED[model].family).table(pretrain(model).model)
    assert sum(map(math.prod, table.theirs.values())) == PUBLISHED[model].parameters


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_model_is_what_its_config_json_says_and_can_be_written_again(model):
    published = PUBLISHED[model]
    chosen = family(published.family)
    resolved = pretrain(model).override(*MADE_UP, *ONE_RANK).finalize(1).model
    assert mismatches(resolved, model_from_hf(published.config, chosen, where=model)) == []
    written_as, written = config_to_hf(resolved, name=published.family)
    assert written_as is chosen
    for name, value in published.config.items():
        if name in written and name != "rope_scaling":
            assert written[name] == value, name


ONE_RANK = (
    "model.tensor_model_parallel_size=1",
    "model.pipeline_model_parallel_size=1",
    "model.virtual_pipeline_model_parallel_size=null",
    "model.context_parallel_size=1",
    "model.expert_model_parallel_size=1",
    "model.expert_tensor_parallel_size=null",
    "model.sequence_parallel=false",
    "ddp.use_distributed_optimizer=false",
    "ddp.overlap_grad_reduce=false",
    "ddp.overlap_param_gather=false",
)


@pytest.mark.parametrize("name", [one.name for one in recipes()])
def test_a_recipe_fits_what_the_planner_knows_of_h100s(name):
    one = next(r for r in recipes() if r.name == name)
    assert one.gpus
    for gpus in one.gpus:
        found = planned(name, gpus)
        assert found.fits, f"{found.peak_bytes / 2**30:.1f} GiB on {gpus}"
        assert found.degrees.world == gpus


def test_small_models_have_a_layout_for_one_gpu_and_most_for_eight():
    by_model = {one.model: one.gpus for one in recipes()}
    assert all(1 in by_model[m] for m, p in PUBLISHED.items() if p.parameters < 3.3e9)
    assert all(8 in by_model[m] for m, p in PUBLISHED.items() if p.parameters < 40e9)


def test_more_gpus_than_a_layout_is_for_are_data_parallel():
    config = recipe("qwen3_8b_pretrain", gpus=16).override(*MADE_UP).finalize(16)
    one = recipe("qwen3_8b_pretrain", gpus=8).override(*MADE_UP).finalize(8)
    assert config.train.data_parallel_size == 2 * one.train.data_parallel_size


def test_fine_tuning_packs_chats_and_pretraining_does_not():
    tuned, trained = sft("llama3_2_1b"), pretrain("llama3_2_1b")
    assert tuned.dataset.packing == "offline"
    assert tuned.optimizer.lr == 5e-6
    assert not hasattr(trained.dataset, "packing")
    assert trained.optimizer.lr == 3e-4


def test_the_tokenizer_is_that_of_the_weights_unless_one_is_given(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = f"checkpoint.pretrained_checkpoint={tmp_path}"
    found = load_recipe("qwen3_8b_sft", [weights])
    assert found.tokenizer.tokenizer_model == str(tmp_path)
    found = load_recipe("qwen3_8b_sft", [weights, "tokenizer.tokenizer_model=other"])
    assert found.tokenizer.tokenizer_model == "other"


def test_an_unknown_recipe_has_near_names():
    with pytest.raises(EngineError, match="did you mean qwen3_8b_sft"):
        recipe("qwen3_8b_stf")
    with pytest.raises(EngineError, match="there is no model 'x'; see mb-train recipes"):
        sft("x")


def test_the_command_lists_recipes_and_prints_one(capsys):
    assert cli.main(["recipes", "--gpus=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("llama3_2_1b_sft "))
    assert "1.2B" in line
    assert "GiB" in line
    assert cli.main(["recipes", "mixtral_8x7b_sft"]) == 0
    assert "num_moe_experts: 8" in capsys.readouterr().out


def test_a_command_takes_a_recipe_in_place_of_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cli.main(["config", "--recipe=llama3_1_8b_sft", "train.train_iters=7"]) == 0
    assert "train_iters: 7" in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps({}))
    arguments = ["config", "--recipe=llama3_1_8b_sft", f"--config={tmp_path / 'a.json'}"]
    assert cli.main(arguments) == 2
    assert "give one of them" in capsys.readouterr().err
