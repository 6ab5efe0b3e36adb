# SPDX-License-Identifier: Apache-2.0
"""``transformers``' own Llama with SDPA attention, in the loop one writes around it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from contenders import shape as sizes
from contenders.shape import Batch, Shape, Weights


class HuggingFace:
    """``LlamaForCausalLM`` and the same fused AdamW as the hand-written loop."""

    name = "transformers"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        config = LlamaConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            vocab_size=shape.vocab,
            max_position_embeddings=shape.seq,
            rms_norm_eps=sizes.NORM_EPS,
            rope_theta=sizes.ROPE_BASE,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = LlamaForCausalLM(config)
        named = {n if n.startswith("lm_head") else f"model.{n}": w for n, w in weights.items()}
        self.model.load_state_dict(named)
        self.model.train()
        # With it the model sees at once that attention is causal and nothing else; without it, it
        # works that out of a mask that it builds in every step.
        self.mask = torch.ones(shape.micro_batch, shape.seq, dtype=torch.int64)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            sizes.decay_groups(dict(self.model.named_parameters())),
            lr=sizes.LEARNING_RATE,
            betas=sizes.BETAS,
            eps=sizes.ADAM_EPS,
            fused=True,
        )

    def step(self, batch: Batch) -> float:
        # Labels are already shifted, which the model's own loss would do once more.
        logits = self.model(
            batch["tokens"], attention_mask=self.mask, position_ids=batch["position_ids"]
        ).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, sizes.CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)
