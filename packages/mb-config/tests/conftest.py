# SPDX-License-Identifier: Apache-2.0
"""A configuration that is valid on any even number of ranks, and the violations of one."""

from __future__ import annotations

import pytest
from mb_config import ConfigContainer, ConfigError

SMALL = (
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.seq_length=32",
    "dataset.path=['pydoc:topics']",
    "train.train_iters=100",
    "train.global_batch_size=16",
)


@pytest.fixture
def small() -> ConfigContainer:
    return ConfigContainer().override(*SMALL)


@pytest.fixture
def violations(small):
    """Return a function from overrides and a world size to ``{field: violation}``."""

    def find(*overrides: str, world_size: int = 4):
        try:
            small.override(*overrides).finalize(world_size)
        except ConfigError as error:
            return {v.field: v for v in error.violations}
        return {}

    return find
