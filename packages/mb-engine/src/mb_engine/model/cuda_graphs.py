# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of a training step: of each layer by Transformer Engine, or of the whole iteration.

Megatron-core captures layers by itself with ``cuda_graph_impl=local``; the two other ways need
somebody who calls for the capture after some eager steps, which is what is here. Evaluation and
generation stay eager: their batches have other shapes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from attrs import define, field

from mb_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)


def with_cuda_graphs(schedule: Callable[..., Any], chunks: Sequence[Any]) -> Callable[..., Any]:
    """Return *schedule*, or one that captures and replays what the configuration asks for.

    Args:
        schedule: Megatron-core's, called with keywords alone.
        chunks: This rank's model chunks, wrapped for data parallelism.
    """
    from megatron.core.utils import get_model_config

    from mb_engine.runtime.megatron_compat import cuda_graph_kind

    config = get_model_config(chunks[0])
    kind = cuda_graph_kind(config)
    if kind == "full_iteration":
        from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

        # They keep graphs and buffers on the class; those of an earlier engine are not ours.
        for stage in ("training", "validation"):
            FullCudaGraphWrapper.cuda_graph[stage] = None
            FullCudaGraphWrapper.result[stage] = None
            FullCudaGraphWrapper.curr_iteration[stage] = 0
            StaticBufferLoader.static_buffers[stage] = []
        warmup = max(1, config.cuda_graph_warmup_steps)
        whole = FullCudaGraphWrapper(schedule, cuda_graph_warmup_steps=warmup)
        return WholeIteration(eager=schedule, graphed=whole)
    if kind == "transformer_engine":
        return LayerGraphs(schedule=schedule, chunks=list(chunks), config=config)
    return schedule


@define(kw_only=True, eq=False)
class WholeIteration:
    """A schedule whose training steps become one graph.

    Attributes:
        eager: The schedule.
        graphed: Megatron-core's wrapper around it.
    """

    eager: Callable[..., Any]
    graphed: Callable[..., Any]
    _micro_batches: int | None = field(default=None, init=False)

    def __call__(self, **arguments: Any) -> Any:
        """Run the schedule; the losses returned are copies, which the next replay leaves alone."""
        if arguments["forward_only"]:
            return self.eager(**arguments)
        count = arguments["num_microbatches"]
        if self._micro_batches not in {None, count}:
            raise EngineError(
                f"a full-iteration CUDA graph of {self._micro_batches} micro-batches cannot run"
                f" {count}; keep train.global_batch_size, or set cuda_graph.cuda_graph_impl=none"
            )
        self._micro_batches = count
        arguments["data_iterator"] = _of_tensors(arguments["data_iterator"])
        store = self.graphed(**arguments)
        return [
            {name: tuple(x.clone() for x in pair) for name, pair in sums.items()} for sums in store
        ]


def _of_tensors(iterators: Any) -> Any:
    """Pass micro-batches through, refusing those with more than tensors in them."""
    if isinstance(iterators, list):
        return [_checked(one) for one in iterators]
    return _checked(iterators)


def _checked(batches: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    import torch

    for batch in batches:
        odd = [name for name, value in batch.items() if not isinstance(value, torch.Tensor)]
        if odd:
            raise EngineError(
                f"a full-iteration CUDA graph takes tensors alone, the batch has {', '.join(odd)};"
                " set cuda_graph.cuda_graph_impl=none for packed sequences"
            )
        yield batch


@define(kw_only=True, eq=False)
class LayerGraphs:
    """A schedule before whose first step after the warm-up each layer's graph is captured.

    Attributes:
        schedule: The schedule.
        chunks: This rank's model chunks.
        config: Megatron-core's ``TransformerConfig``.
    """

    schedule: Callable[..., Any]
    chunks: list[Any]
    config: Any
    _steps: int = field(default=0, init=False)

    def __call__(self, **arguments: Any) -> Any:
        """Run the schedule."""
        if not arguments["forward_only"]:
            if self._steps == self.config.cuda_graph_warmup_steps:
                self._capture(arguments)
            self._steps += 1
        return self.schedule(**arguments)

    def _capture(self, arguments: Mapping[str, Any]) -> None:
        from megatron.core import num_microbatches_calculator, parallel_state
        from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

        count, rows = arguments["num_microbatches"], arguments["micro_batch_size"]
        ranks = parallel_state.get_data_parallel_world_size()
        # The helper asks megatron-core's own count of micro-batches.
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        num_microbatches_calculator.init_num_microbatches_calculator(
            rank=parallel_state.get_data_parallel_rank(),
            rampup_batch_size=None,
            global_batch_size=count * rows * ranks,
            micro_batch_size=rows,
            data_parallel_size=ranks,
        )
        helper = TECudaGraphHelper(
            model=self.chunks,
            config=self.config,
            seq_length=arguments["seq_length"],
            micro_batch_size=rows,
        )
        gathers = [c for c in self.chunks if c.ddp_config.overlap_param_gather]
        for chunk in gathers:
            chunk.disable_forward_pre_hook(param_sync=self._steps > 0)
        helper.create_cudagraphs()
        for chunk in gathers:
            chunk.enable_forward_pre_hook()
        if gathers:
            helper.cuda_graph_set_manual_hooks()
        logger.info("captured CUDA graphs of layers after %d steps", self._steps)
