# SPDX-License-Identifier: Apache-2.0
"""Initial weights that depend on the seed and not on the layout.

Megatron-core draws weights in the order in which a rank builds its modules, so another tensor- or
pipeline-parallel layout is another model. Here every global tensor is drawn whole, from a generator
seeded with the job's seed and the tensor's name in checkpoints, and a rank keeps its part. The cost
is that each rank draws the full tensors it has a part of: seconds for a model that fits a CPU.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_config import RNGConfig
    from mb_config.records import ProcessLayout, TensorShard
    from torch import Tensor, nn

_INTO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
_RANDOM_BIAS = "router.bias"
_EMBEDDINGS = ("word_embeddings.weight", "position_embeddings.weight")


def initialize_weights(
    chunks: Sequence[nn.Module], config: Any, rng: RNGConfig, layout: ProcessLayout
) -> None:
    """Draw every matrix of *chunks* anew, and the bias of routers.

    Other vectors (biases, norms) keep their constants.

    The distribution of a matrix is megatron-core's: ``output_layer_init_method`` for matrices that
    write into the residual stream, ``embedding_init_method`` for embeddings, else ``init_method``.

    Args:
        chunks: Model chunks of this rank.
        config: Megatron-core's ``TransformerConfig``.
        rng: The ``rng`` section; with ``data_parallel_random_init`` replicas differ.
        layout: This rank's place.
    """
    from mb_engine.parallel.shards import model_shards

    seed = rng.seed + (10 * layout.dp_rank if rng.data_parallel_random_init else 0)
    parameters = {p.untyped_storage().data_ptr() for c in chunks for p in c.parameters()}
    drawn: dict[str, Tensor] = {}
    for shard in model_shards(chunks, prefix=""):
        is_parameter = shard.data.untyped_storage().data_ptr() in parameters
        is_drawn = shard.data.dim() > 1 or shard.key.endswith(_RANDOM_BIAS)
        if not is_parameter or not is_drawn:
            continue
        if shard.key not in drawn:
            drawn = {shard.key: _draw(shard, config, seed)}  # pieces of one tensor come together
        box = tuple(
            slice(start, start + extent)
            for start, extent in zip(shard.offset, shard.local_shape, strict=True)
        )
        with torch.no_grad():
            shard.data.copy_(drawn[shard.key][box])


def _draw(shard: TensorShard, config: Any, seed: int) -> Tensor:
    """Return the whole tensor that *shard* is a piece of, float32 on the CPU."""
    method = config.init_method
    if shard.key.endswith(_INTO_RESIDUAL):
        method = config.output_layer_init_method
    elif shard.key.endswith(_EMBEDDINGS):
        method = config.embedding_init_method or config.init_method
    digest = hashlib.sha256(f"{seed}:{shard.key}".encode()).digest()
    whole = torch.empty(shard.global_shape, dtype=torch.float32, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        method(whole)
    return whole
