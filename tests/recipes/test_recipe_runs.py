# SPDX-License-Identifier: Apache-2.0
"""A recipe runs as it stands, checkpoints included, once its model is made small."""

from __future__ import annotations

from mb_engine import cli


def test_a_recipe_runs(capfd, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    shrunk = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "seq_length": 32,
        "vocab_size": 300,
    }
    arguments = [f"model.{name}={value}" for name, value in shrunk.items()]
    arguments += ["dataset.type=mock", "tokenizer.tokenizer_type=bytes", "dist.device=cpu"]
    arguments += ["tokenizer.tokenizer_model=null", "train.train_iters=1", "mixed_precision=null"]
    arguments += ["train.global_batch_size=4", "validation.eval_interval=null"]
    arguments += ["scheduler.lr_warmup_iters=0"]
    assert cli.main(["run", "--recipe=llama3_2_1b_pretrain", "--nproc=1", *arguments]) == 0
    assert "loss" in capfd.readouterr().out
