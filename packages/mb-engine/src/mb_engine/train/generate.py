# SPDX-License-Identifier: Apache-2.0
"""Sampling from a model in any tensor- and pipeline-parallel layout.

Every token costs a forward pass over the window: right for a look at a model in training. To serve
a model, export it.

Shape suffixes: S = sequence, V = vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mb_config import ConfigContainer
    from torch import Tensor, nn

    from mb_engine.train.step import MicroBatchRunner

# Windows grow in steps, so that few different shapes are seen.
_BUCKET = 64


def generate(
    runner: MicroBatchRunner,
    config: ConfigContainer,
    tokens: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Return *tokens* and their sampled continuation; call it on all ranks together.

    Args:
        runner: Holds the model, in eval mode and without gradients.
        config: The resolved configuration.
        tokens: The prompt, at least one token.
        max_new_tokens: How many to add.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among so many likeliest tokens; 0 for all.
        seed: Of the sampling, the same on every rank.
        stop: A token that ends the text, None for none.

    Raises:
        EngineError: If the prompt is empty, or sequences are split over context-parallel ranks.
    """
    if not tokens:
        raise EngineError("generate needs a prompt of at least one token")
    if runner.layout.cp > 1:
        raise EngineError(
            f"generate does not work with context_parallel_size={runner.layout.cp}; load the"
            " checkpoint with context_parallel_size=1"
        )
    generator = torch.Generator().manual_seed(seed)
    out = list(tokens)
    vocabulary = config.model.vocab_size
    for _ in range(max_new_tokens):
        window = out[-config.model.seq_length :]
        logits_V = _last_logits(runner, window, config.model.seq_length)[:vocabulary]
        token = _sample(logits_V, temperature=temperature, top_k=top_k, generator=generator)
        out.append(token)
        if token == stop:
            break
    return out


def _last_logits(runner: MicroBatchRunner, window: Sequence[int], limit: int) -> Tensor:
    """Return the float32 logits after the last token of *window*, on every rank, on the CPU."""
    layout = runner.layout
    multiple = math.lcm(_BUCKET, layout.tp)
    length = min(-(-len(window) // multiple) * multiple, limit)
    device = torch.device(layout.device)
    # Padding on the right is invisible to earlier tokens of a causal model.
    ids_1S = torch.zeros(1, length, dtype=torch.int64, device=device)
    ids_1S[0, : len(window)] = torch.tensor(window, device=device)
    batch = {"tokens": ids_1S, "position_ids": torch.arange(length, device=device)[None]}
    last = len(window) - 1
    # Interleaved stages take as many micro-batches as there are stages: copies, one of them read.
    copies = layout.pp if len(runner.chunks) > 1 else 1
    store = runner.schedule()(
        forward_step_func=partial(_forward, last),
        data_iterator=[iter([batch] * copies) for _ in runner.chunks],
        model=runner.chunks,
        num_microbatches=copies,
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return _to_all_stages(runner, store)


def _forward(last: int, data: Iterator[Mapping[str, Tensor]], model: nn.Module) -> Any:
    batch = next(data)
    logits = model(batch["tokens"], batch["position_ids"], None)

    def pick(output_1SV: Tensor, *, non_loss_data: bool = True) -> Tensor:
        del non_loss_data  # the schedule's way to say that it wants no loss
        return output_1SV[0, last]

    return logits, pick


def _to_all_stages(runner: MicroBatchRunner, store: list[Tensor]) -> Tensor:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    layout = runner.layout
    logits_V: list[Any] = [None]
    if layout.pp_rank == layout.pp - 1:
        logits_V = [gather_from_tensor_model_parallel_region(store[0]).float().cpu()]
    if layout.pp > 1:
        group = layout.groups["pp"]
        source = torch.distributed.get_global_rank(group, layout.pp - 1)
        torch.distributed.broadcast_object_list(logits_V, source, group=group)
    result: Tensor = logits_V[0]
    return result


def _sample(logits_V: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    if 0 < top_k < logits_V.numel():
        threshold = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, float("-inf"))
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))
