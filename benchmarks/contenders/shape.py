# SPDX-License-Identifier: Apache-2.0
"""What is trained, and the interface of what trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8
CLIP_NORM = 1.0
NORM_EPS = 1e-5
ROPE_BASE = 10_000

Weights = dict[str, Tensor]
"""Parameters under their names in a Hugging Face Llama, ``model.`` left out."""

Batch = Mapping[str, Tensor]
"""``tokens``, ``labels``, ``position_ids`` int64 and ``loss_mask`` float32, all ``[B, S]``."""


@frozen(kw_only=True)
class Shape:
    """Sizes of a model and its batches, and the threads it is measured with."""

    name: str
    hidden: int
    layers: int
    ffn: int
    heads: int
    groups: int
    vocab: int
    seq: int
    micro_batch: int
    threads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.seq * self.micro_batch


HIDDEN_256 = Shape(
    name="hidden 256", hidden=256, layers=6, ffn=704, heads=4, groups=2, vocab=8192,
    seq=512, micro_batch=4, threads=2,
)  # fmt: skip
HIDDEN_64 = Shape(
    name="hidden 64", hidden=64, layers=4, ffn=128, heads=4, groups=2, vocab=128,
    seq=32, micro_batch=2, threads=1,
)  # fmt: skip


class Contender(Protocol):
    """One way to train."""

    name: str

    def step(self, batch: Batch) -> float:
        """Do forward, loss, backward, clipping and Adam on *batch*; return the mean loss."""
        ...

    def num_parameters(self) -> int:
        """Return how many numbers are trained."""
        ...


def initial_weights(shape: Shape, seed: int = 1234) -> Weights:
    """Return weights drawn from N(0, 0.02); norm weights are near 1, each its own value."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.02

    def norm() -> Tensor:
        return 1.0 + 0.1 * torch.randn(shape.hidden, generator=generator)

    kv = shape.groups * shape.head_dim
    weights = {"embed_tokens.weight": matrix(shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        weights |= {
            f"layers.{i}.input_layernorm.weight": norm(),
            f"layers.{i}.self_attn.q_proj.weight": matrix(shape.hidden, shape.hidden),
            f"layers.{i}.self_attn.k_proj.weight": matrix(kv, shape.hidden),
            f"layers.{i}.self_attn.v_proj.weight": matrix(kv, shape.hidden),
            f"layers.{i}.self_attn.o_proj.weight": matrix(shape.hidden, shape.hidden),
            f"layers.{i}.post_attention_layernorm.weight": norm(),
            f"layers.{i}.mlp.gate_proj.weight": matrix(shape.ffn, shape.hidden),
            f"layers.{i}.mlp.up_proj.weight": matrix(shape.ffn, shape.hidden),
            f"layers.{i}.mlp.down_proj.weight": matrix(shape.hidden, shape.ffn),
        }
    return weights | {
        "norm.weight": norm(),
        "lm_head.weight": matrix(shape.vocab, shape.hidden),
    }


def batches(shape: Shape, count: int, seed: int = 5) -> list[Batch]:
    """Return *count* batches of random tokens, every token counted in the loss."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.micro_batch, shape.seq + 1)
    found = []
    for _ in range(count):
        ids = torch.randint(0, shape.vocab, size, generator=generator)
        found.append(
            {
                "tokens": ids[:, :-1].contiguous(),
                "labels": ids[:, 1:].contiguous(),
                "loss_mask": torch.ones(shape.micro_batch, shape.seq),
                "position_ids": torch.arange(shape.seq).repeat(shape.micro_batch, 1),
            }
        )
    return found


def decay_groups(named: Mapping[str, torch.nn.Parameter]) -> list[dict[str, object]]:
    """Return Adam's parameter groups: matrices decay, norm weights do not."""
    return [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
