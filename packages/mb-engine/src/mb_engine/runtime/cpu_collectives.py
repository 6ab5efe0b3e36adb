# SPDX-License-Identifier: Apache-2.0
"""Collectives of torch.distributed that take what NCCL takes, over gloo."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def all_to_all_of_lists(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``all_to_all_single`` that also takes split sizes as tensors."""

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    @functools.wraps(exchange)
    def all_to_all_single(
        output: Tensor,
        input: Tensor,  # noqa: A002 - torch's name, which callers use
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return exchange(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs
        )

    return all_to_all_single


def uneven_all_gather(gather: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``all_gather`` of tensors that may differ in their first dimension."""

    @functools.wraps(gather)
    def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, **kw: Any) -> Any:
        if _all_alike(tensor_list):
            return gather(tensor_list, tensor, group, **kw)
        padded = tensor.new_zeros((max(map(len, tensor_list)), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in tensor_list]
        gather(parts, padded, group)
        for output, part in zip(tensor_list, parts, strict=True):
            output.copy_(part[: len(output)])
        return None

    return all_gather


def uneven_reduce_scatter(reduce_and_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``reduce_scatter`` of tensors that may differ in their first dimension."""
    dist = torch.distributed

    @functools.wraps(reduce_and_scatter)
    def reduce_scatter(
        output: Tensor,
        input_list: list[Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        **kw: Any,
    ) -> Any:
        if _all_alike(input_list):
            return reduce_and_scatter(output, input_list, op, group, **kw)
        whole = torch.cat(input_list)
        dist.all_reduce(whole, op, group)
        sizes = [len(part) for part in input_list]
        output.copy_(torch.split(whole, sizes)[dist.get_rank(group)])
        return None

    return reduce_scatter


def _all_alike(tensors: list[Tensor]) -> bool:
    return all(tensor.shape == tensors[0].shape for tensor in tensors)
