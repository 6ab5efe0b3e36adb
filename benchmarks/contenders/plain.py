# SPDX-License-Identifier: Apache-2.0
"""The yardstick: a Llama-like GPT and its training step written by hand in plain PyTorch.

Written for speed on a CPU as far as plain PyTorch goes, each choice the faster one where there was
a choice: one matrix for queries, keys and values and one for gate and up, a rotary table computed
once and applied to queries and keys together, grouped-query attention by
``scaled_dot_product_attention``, no biases, fused AdamW, gradients dropped rather than zeroed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from contenders import shape as sizes
from contenders.shape import Batch, Shape, Weights


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind an RMSNorm and with a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, kv = shape.hidden, shape.groups * shape.head_dim
        self.attention_norm = nn.RMSNorm(hidden, eps=sizes.NORM_EPS)
        self.qkv = nn.Linear(hidden, hidden + 2 * kv, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=sizes.NORM_EPS)
        self.gate_up = nn.Linear(hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, hidden, bias=False)

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BSH = x_BSH + self._attention(self.attention_norm(x_BSH), cos, sin)
        gate, up = self.gate_up(self.mlp_norm(x_BSH)).chunk(2, dim=-1)
        return x_BSH + self.down(functional.silu(gate) * up)

    def _attention(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, g, d = self.shape.heads, self.shape.groups, self.shape.head_dim
        batch, seq, _ = x_BSH.shape
        heads_BNSD = self.qkv(x_BSH).view(batch, seq, n + 2 * g, d).transpose(1, 2)
        qk, v = heads_BNSD.split((n + g, g), dim=1)
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat((-second, first), dim=-1) * sin
        q, k = qk.split((n, g), dim=1)
        y_BNSD = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y_BNSD.transpose(1, 2).reshape(batch, seq, -1))


class PlainGPT(nn.Module):
    """The model; returns the mean cross-entropy."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=sizes.NORM_EPS)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        d = shape.head_dim
        frequencies = 1.0 / sizes.ROPE_BASE ** (torch.arange(0, d, 2).float() / d)
        angles = torch.outer(torch.arange(shape.seq).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        x_BSH = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSH = block(x_BSH, self.cos, self.sin)
        logits = self.head(self.norm(x_BSH))
        return functional.cross_entropy(logits.flatten(0, 1), labels_BS.flatten())


class Plain:
    """The hand-written loop."""

    name = "hand-written loop"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.model = PlainGPT(shape)
        self.model.load_state_dict(plain_state(shape, weights))
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            sizes.decay_groups(dict(self.model.named_parameters())),
            lr=sizes.LEARNING_RATE,
            betas=sizes.BETAS,
            eps=sizes.ADAM_EPS,
            fused=True,
        )

    def step(self, batch: Batch) -> float:
        loss = self.model(batch["tokens"], batch["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, sizes.CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)


def plain_state(shape: Shape, weights: Weights) -> Weights:
    """Return *weights* under this model's names, the fused matrices stacked."""
    state = {
        "embedding.weight": weights["embed_tokens.weight"],
        "norm.weight": weights["norm.weight"],
        "head.weight": weights["lm_head.weight"],
    }
    for i in range(shape.layers):
        old, new = f"layers.{i}", f"blocks.{i}"
        attention = [weights[f"{old}.self_attn.{n}_proj.weight"] for n in "qkv"]
        mlp = [weights[f"{old}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
        state |= {
            f"{new}.attention_norm.weight": weights[f"{old}.input_layernorm.weight"],
            f"{new}.qkv.weight": torch.cat(attention),
            f"{new}.out.weight": weights[f"{old}.self_attn.o_proj.weight"],
            f"{new}.mlp_norm.weight": weights[f"{old}.post_attention_layernorm.weight"],
            f"{new}.gate_up.weight": torch.cat(mlp),
            f"{new}.down.weight": weights[f"{old}.mlp.down_proj.weight"],
        }
    return state
