# SPDX-License-Identifier: Apache-2.0
"""What multi-head latent attention keeps for its backward pass.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1, as megatron-core's ``MLASelfAttention`` computes
it; on a CPU compared with what autograd keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_engine.plan.layout import exchange
from mb_engine.plan.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import ConfigContainer

    from mb_engine.plan.layout import Degrees
    from mb_engine.plan.sizes import Sizes

_FLOAT = 4
_ROTATIONS = 4  # cosine and sine, of queries and of keys


def latent_attention(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, spec: str, device: str
) -> Iterator[Saved]:
    """Yield what lies between the input of the first projections and of the last.

    Args:
        config: Resolved.
        degrees: Of the job.
        sizes: Of one micro-batch.
        spec: ``"torch"`` or ``"te"``.
        device: ``"cpu"`` or ``"cuda"``.
    """
    model, tokens, element = config.model, sizes.spread_tokens, sizes.element
    widths = {"keys and values": model.kv_lora_rank}
    if model.q_lora_rank is not None:
        widths["queries"] = model.q_lora_rank
    positions = tokens * model.qk_pos_emb_head_dim * element
    if model.qk_layernorm:
        for name, width in widths.items():
            yield Saved(f"norm of compressed {name}", "attention", _norm(sizes, width, device))
        if device == "cuda" or element == _FLOAT:
            yield Saved("compressed positions", "attention", positions)
    else:
        yield Saved("compressed positions", "attention", positions)
    for name, width in widths.items():
        yield Saved(f"compressed {name}", "attention", tokens * width * element)
    rotated = sizes.length * model.qk_pos_emb_head_dim * element
    yield Saved("cosine and sine", "attention", _ROTATIONS * rotated)
    yield from _core(config, degrees, sizes, spec=spec, device=device)
    yield Saved("input of the output projection", "attention", sizes.attended)


def _norm(sizes: Sizes, width: int, device: str) -> float:
    size = sizes.spread_tokens * width
    if device == "cpu" and sizes.element < _FLOAT:
        return 2 * size * _FLOAT + sizes.spread_tokens * _FLOAT
    return size * sizes.element + sizes.spread_tokens * _FLOAT


def _core(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, spec: str, device: str
) -> Iterator[Saved]:
    model = config.model
    heads = model.num_attention_heads // degrees.tp
    statistics = sizes.tokens * heads * _FLOAT
    narrower = model.v_head_dim != model.qk_head_dim + model.qk_pos_emb_head_dim
    if degrees.cp > 1:
        kind = exchange(model)
        if spec == "torch" and kind == "p2p":
            # Values and outputs are widened to the width of keys.
            yield Saved("queries, keys, values and output", "core", 4 * sizes.query)
        elif spec == "torch" and kind == "all_gather":
            gathered = degrees.cp * (sizes.key + sizes.value)
            if device == "cpu" and narrower:
                # Both chunks keep the keys they see, and the probabilities.
                prefixes = sizes.key * (2 * degrees.cp + 1) / 2
                chunk = sizes.length // 2
                scores = chunk**2 * (2 * degrees.cp + 1) * heads * _FLOAT
                scores *= config.train.micro_batch_size
                wide = (sizes.query + prefixes) * _FLOAT / sizes.element
                yield Saved("queries, keys, probabilities", "core", gathered + wide + scores)
                return
            yield Saved("queries, keys and values of all ranks", "core", sizes.query + gathered)
            yield Saved("outputs of both chunks", "core", sizes.attended)
        else:
            yield Saved("queries, keys and values", "core", sizes.query + sizes.key + sizes.value)
            yield Saved("output by heads", "core", sizes.attended)
        yield Saved("log-sum-exp", "core", statistics)
        return
    unfused = model.attention_backend in {"unfused", "local"} or model.attention_dropout > 0
    if (device == "cpu" and (narrower or unfused)) or model.attention_backend == "unfused":
        scores = config.train.micro_batch_size * heads * sizes.length**2 * _FLOAT
        yield Saved("probabilities", "core", scores * (3 if model.attention_dropout else 1))
        wide = _FLOAT // sizes.element if device == "cpu" else 1
        held = (sizes.query + sizes.key + sizes.value) * wide
        yield Saved("scaled queries, keys and values", "core", held)
        return
    yield Saved("queries, keys and values", "core", sizes.query + sizes.key + sizes.value)
    yield Saved("log-sum-exp", "core", statistics)
