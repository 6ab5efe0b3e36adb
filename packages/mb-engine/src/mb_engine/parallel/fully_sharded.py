# SPDX-License-Identifier: Apache-2.0
"""Megatron-FSDP around a model chunk, and its shards as pieces of global tensors.

Megatron-FSDP keeps parameters, gradients and optimizer states as flat slices of buffers. Which
piece of the whole model a parameter is, is asked of the model before it is cut up; a rank's slice
of a parameter is then a range of that piece, as it is with the distributed optimizer. So a
checkpoint is the same whether it was written with Megatron-FSDP or without.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import attrs
import torch
from attrs import frozen
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from mb_engine.errors import EngineError
from mb_engine.parallel.optimizer_state import MAIN_PARAM
from mb_engine.parallel.shards import pieces_by_name, state_shard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mb_config import ConfigContainer
    from mb_config.records import TensorShard
    from torch import Tensor, nn

    from mb_engine.parallel.shards import Piece


@frozen(kw_only=True, eq=False)
class _Slice:
    """One parameter on this rank.

    Attributes:
        name: In the model chunk.
        values: This rank's part of the model's own values, one-dimensional.
        main: The same part of the optimizer's float32 values, None where the model's are those.
        range: This rank's elements of the flattened parameter, from and up to.
        optimized: What the optimizer knows the parameter as.
    """

    name: str
    values: Tensor
    main: Tensor | None
    range: tuple[int, int]
    optimized: Tensor


class FullyShardedChunk(FullyShardedDataParallel):  # type: ignore[misc]
    """A model chunk whose parameters lie scattered over the data-parallel ranks."""

    def __init__(
        self, config: Any, ddp_config: Any, module: nn.Module, boxes: Mapping[str, Sequence[Piece]]
    ) -> None:
        """Cut *module* up.

        Args:
            config: Megatron-core's ``TransformerConfig``.
            ddp_config: Megatron-core's ``DistributedDataParallelConfig``.
            module: The chunk, whole on this rank.
            boxes: What of the whole model each parameter and buffer is, by its name.
        """
        super().__init__(config=config, ddp_config=ddp_config, module=module)
        self._boxes = boxes

    @property
    def chunk(self) -> nn.Module:
        """The model chunk inside."""
        inner: nn.Module = self.module.module
        return inner

    def model_shards(self, prefix: str) -> Iterator[TensorShard]:
        """Yield this rank's pieces of all parameters and persistent buffers."""
        for part in self._slices():
            for box in self._boxes[part.name]:
                yield from _found(state_shard(prefix + box.key, box, part.values, part.range))
        buffers = dict(self.chunk.named_buffers())
        for name in self._boxes.keys() & buffers.keys():
            for box in self._boxes[name]:
                yield box.shard(prefix + box.key, buffers[name].view(-1)[box.start : box.stop])

    def optimizer_shards(self, optimizer: Any, prefix: str) -> Iterator[TensorShard]:
        """Yield this rank's pieces of the optimizer's state, in the model's shape."""
        states: dict[int, Mapping[str, Any]] = {}
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            states |= {id(p): state for p, state in one.optimizer.state.items()}
        for part in self._slices():
            state = states.get(id(part.optimized), {})
            tensors = {
                name: _local(value)
                for name, value in state.items()
                if isinstance(value, torch.Tensor) and name != "step"
            }
            if part.main is not None:
                tensors[MAIN_PARAM] = part.main
            for name, tensor in tensors.items():
                for box in self._boxes[part.name]:
                    key = f"{prefix}{name}.{box.key}"
                    yield from _found(state_shard(key, box, tensor, part.range))

    @torch.no_grad()
    def take_over(self, *, main_params: bool) -> None:
        """Make use of what a load wrote into the shards.

        Args:
            main_params: The optimizer's float32 values were loaded as well; else they are set to
                the model's.
        """
        if not main_params:
            for part in self._slices():
                if part.main is not None:
                    part.main.copy_(part.values)
        # Layers gathered ahead have the values from before the load.
        gathers = self.module.all_gather_pipeline
        for bucket, backward in list(gathers.param_gather_event_map):
            gathers.wait_bucket_ready(bucket, backward)
        self.module.synchronize_param_gather()
        self.start_param_sync()

    def _slices(self) -> Iterator[_Slice]:
        buffer = self.param_and_grad_buffer
        for name, optimized in buffer.optimizer_named_parameters:
            whole = optimized.orig_param
            group = buffer.parameter_groups[buffer.param_to_param_group[whole]]
            values, main = group.model_weight_buffer, group.main_weight_buffer
            item = values.param_idx[whole]
            first, last = values._get_item_slice_in_shard(item)  # noqa: SLF001
            if first < last:
                yield _Slice(
                    name=name,
                    values=values.get_item(item, only_shard=True).view(-1),
                    main=None
                    if main is None
                    else main.get_item(main.param_idx[whole], only_shard=True).view(-1),
                    range=(first, last),
                    optimized=optimized,
                )


def fully_sharded(config: ConfigContainer, chunk: nn.Module) -> FullyShardedChunk:
    """Return *chunk* in Megatron-FSDP; every field of ``config.ddp`` it knows is passed on.

    Raises:
        EngineError: If einops is missing, or the environment keeps it from overlapping anything.
    """
    from megatron.core.utils import get_model_config

    _check_environment()
    _name_parallel_weights(chunk)
    return FullyShardedChunk(
        config=get_model_config(chunk),
        ddp_config=fsdp_config(config),
        module=chunk,
        boxes=pieces_by_name(chunk),
    )


def fsdp_config(config: ConfigContainer) -> Any:
    """Return megatron-core's ``DistributedDataParallelConfig`` for Megatron-FSDP."""
    known = DistributedDataParallelConfig.__dataclass_fields__
    values = {k: v for k, v in attrs.asdict(config.ddp, recurse=False).items() if k in known}
    # The fused scaling is a kind of sum that NCCL alone has.
    values["gradient_reduce_div_fusion"] = torch.distributed.get_backend() == "nccl"
    in_16_bits = config.model.params_dtype != "float32"
    # Float32 parameters are their own main parameters.
    if "megatron_fsdp_main_params_dtype" in known:
        values["megatron_fsdp_main_params_dtype"] = torch.float32 if in_16_bits else None
        if config.ddp.grad_reduce_in_fp32:
            values["megatron_fsdp_main_grads_dtype"] = torch.float32
    else:
        values["preserve_fp32_weights"] = in_16_bits
    return DistributedDataParallelConfig(**values)


def _check_environment() -> None:
    if not mcore_fsdp_adapter.HAVE_EINOPS:
        raise EngineError(
            'ddp.use_megatron_fsdp=True needs einops; pip install "mb-engine[fsdp]", or set it to'
            " false"
        )
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if torch.cuda.is_available() and connections == "1":
        raise EngineError(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 keeps Megatron-FSDP's gathers behind the computation;"
            " unset it, or set ddp.use_megatron_fsdp to false"
        )


def _name_parallel_weights(chunk: nn.Module) -> None:
    """Say how the weights of linears with names of their own are split.

    From 0.19 on Megatron-FSDP goes by the class's name, which leaves subclasses out.
    """
    for module in chunk.modules():
        kind = (
            "column"
            if isinstance(module, ColumnParallelLinear)
            else "row"
            if isinstance(module, RowParallelLinear)
            else None
        )
        if kind is None:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            replicated = kind == "row" and name == "bias"
            parameter._tensor_parallel_mode = "replicated" if replicated else kind  # type: ignore[attr-defined] # noqa: SLF001


def _local(tensor: Tensor) -> Tensor:
    own: Tensor = getattr(tensor, "_local_tensor", tensor)
    return own.detach().view(-1)


def _found(shard: TensorShard | None) -> Iterator[TensorShard]:
    if shard is not None:
        yield shard
