# SPDX-License-Identifier: Apache-2.0
"""``mb_engine.Engine`` on one rank: float32, torch layer spec, next to nothing else configured."""

from __future__ import annotations

import torch
from mb_config import ConfigContainer
from mb_engine import Engine

from contenders import shape as sizes
from contenders.shape import Batch, Shape, Weights


class EngineLoop:
    """The engine, driven as one's own loop would drive it."""

    name = "mb-engine"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.engine = Engine.from_config(config(shape))
        (model,) = self.engine.model
        named = dict(model.named_parameters())
        state = engine_state(shape, weights)
        if named.keys() != state.keys():
            raise ValueError(f"other parameters than expected: {sorted(named.keys() ^ state)}")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(state[name])
        self.engine.optimizer.reload_model_params()

    def step(self, batch: Batch) -> float:
        terms = self.engine.forward_backward([batch])
        self.engine.optimizer_step()
        return terms.loss.item()

    def close(self) -> None:
        self.engine.close()

    def num_parameters(self) -> int:
        return sum(p.numel() for model in self.engine.model for p in model.parameters())


def config(shape: Shape) -> ConfigContainer:
    """Return the configuration of *shape* on one CPU rank, all else as the defaults are."""
    return ConfigContainer.from_dict(
        {
            "model": {
                "num_layers": shape.layers,
                "hidden_size": shape.hidden,
                "num_attention_heads": shape.heads,
                "num_query_groups": shape.groups,
                "ffn_hidden_size": shape.ffn,
                "seq_length": shape.seq,
                "vocab_size": shape.vocab,
                "layernorm_epsilon": sizes.NORM_EPS,
                "rotary_base": sizes.ROPE_BASE,
                "layer_spec": "torch",
            },
            "train": {
                "micro_batch_size": shape.micro_batch,
                "global_batch_size": shape.micro_batch,
                "train_iters": 1_000_000,
            },
            "optimizer": {
                "lr": sizes.LEARNING_RATE,
                "min_lr": sizes.LEARNING_RATE,
                "weight_decay": sizes.WEIGHT_DECAY,
                "adam_beta1": sizes.BETAS[0],
                "adam_beta2": sizes.BETAS[1],
                "adam_eps": sizes.ADAM_EPS,
                "clip_grad": sizes.CLIP_NORM,
            },
            "scheduler": {"lr_decay_style": "constant"},
            "dataset": {"type": "mock"},
            "tokenizer": {"tokenizer_type": "null", "vocab_size": shape.vocab},
            "dist": {"device": "cpu"},
        }
    )


def engine_state(shape: Shape, weights: Weights) -> Weights:
    """Return *weights* under megatron-core's names.

    Queries, keys and values are interleaved by group: the queries of group 0, its key, its value,
    then group 1.
    """
    state = {
        "embedding.word_embeddings.weight": weights["embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["norm.weight"],
        "output_layer.weight": weights["lm_head.weight"],
    }
    for i in range(shape.layers):
        old, new = f"layers.{i}", f"decoder.layers.{i}"
        q, k, v = (
            weights[f"{old}.self_attn.{n}_proj.weight"].view(shape.groups, -1, shape.hidden)
            for n in "qkv"
        )
        mlp = [weights[f"{old}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
        state |= {
            f"{new}.input_layernorm.weight": weights[f"{old}.input_layernorm.weight"],
            f"{new}.self_attention.linear_qkv.weight": torch.cat((q, k, v), 1).flatten(0, 1),
            f"{new}.self_attention.linear_proj.weight": weights[f"{old}.self_attn.o_proj.weight"],
            f"{new}.pre_mlp_layernorm.weight": weights[f"{old}.post_attention_layernorm.weight"],
            f"{new}.mlp.linear_fc1.weight": torch.cat(mlp),
            f"{new}.mlp.linear_fc2.weight": weights[f"{old}.mlp.down_proj.weight"],
        }
    return state
