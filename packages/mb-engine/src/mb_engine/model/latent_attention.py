# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention of the torch layer spec.

Shape suffixes: S = tokens of a sequence, B = micro-batch, I = hidden size, R = compressed width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


class TorchLatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Attention over compressed keys and values, with positions in a part of each head.

    Same parameters by name and shape as with Transformer Engine: the projections that compress are
    whole on every tensor-parallel rank. Megatron-core's own splits them, and then leaves out the
    gradient that the rotated part of the keys gets from other ranks' heads.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Take what megatron-core gives to ``MLASelfAttention``."""
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj: Any = WholeLinear(config, config.q_lora_rank)
        width = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj: Any = WholeLinear(config, width)


class WholeLinear(nn.Module):
    """``x @ weight.T`` with the whole weight on every tensor-parallel rank.

    Under sequence parallelism a rank multiplies its own tokens, and the gradients of the weight are
    added up over ranks.
    """

    def __init__(self, config: Any, output_size: int) -> None:
        """Allocate the weight ``[output_size, hidden_size]`` and draw it."""
        super().__init__()
        weight = torch.empty(output_size, config.hidden_size, dtype=config.params_dtype)
        if config.perform_initialization:
            config.init_method(weight)
        self.weight = nn.Parameter(weight)
        # Not a torch attribute: megatron-core looks for it.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, None]:
        """Return ``[S, B, R]`` and no bias.

        Args:
            x_SBI: ``[S, B, I]``; ``[S/tp, B, I]`` under sequence parallelism.
        """
        return functional.linear(x_SBI, self.weight), None
