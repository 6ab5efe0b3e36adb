# SPDX-License-Identifier: Apache-2.0
"""Token embeddings that are multiplied by a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def scale_embedding(chunk: Any, scale: float | None) -> None:
    """Let the embedding of *chunk*, if it has one, give *scale* times its rows.

    The scale is rounded to the dtype of the embedding, as Gemma does.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.4.

    Args:
        chunk: A GPT model; only its output is changed, not its parameters.
        scale: None leaves it.
    """
    embedding = getattr(chunk, "embedding", None)
    if scale is None or embedding is None:
        return

    def scaled(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(scale, dtype=output.dtype).item()

    embedding.register_forward_hook(scaled)
