# SPDX-License-Identifier: Apache-2.0
"""Small models."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width // 2)
        self.out_proj = nn.Linear(width // 2, width)

    def forward(self, x):
        h = self.norm(x)
        return x + self.out_proj(torch.tanh(self.v_proj(torch.sigmoid(self.q_proj(h)))))


class Tiny(nn.Module):
    """Embedding, two blocks, a head tied to the embedding."""

    def __init__(self, width=8, classes=12, layers=2):
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, classes, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tiny().double()


@pytest.fixture
def ids():
    return torch.randint(0, 12, (3, 5), generator=torch.Generator().manual_seed(1))
