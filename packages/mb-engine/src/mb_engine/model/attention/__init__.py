# SPDX-License-Identifier: Apache-2.0
"""Attention of the torch layer spec."""

from __future__ import annotations

from mb_engine.model.attention.core import TorchAttention
from mb_engine.model.attention.packed import PackedSequences
from mb_engine.model.attention.scoring import visible_keys

__all__ = ["PackedSequences", "TorchAttention", "visible_keys"]
