# SPDX-License-Identifier: Apache-2.0
"""A kit that checks any ``LinearFactory`` against what the Protocol promises.

Call ``check_factory(factory, make_base, x)`` in a test; it raises AssertionError naming the broken
promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from mb_config import LoRA
from torch import nn

from mb_peft.lora import LoRALinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mb_peft.interfaces import LinearFactory

RANK, ALPHA = 3, 7.5


def check_factory(
    factory: LinearFactory,
    make_base: Callable[[], nn.Module],
    x: Tensor,
    *,
    tolerance: float = 1e-6,
) -> None:
    """Check every promise of ``LinearFactory`` for one kind of linear.

    Args:
        factory: What to check.
        make_base: Returns a new linear with random weights.
        x: An input for it, with some value other than zero.
        tolerance: Relative error allowed between the merged and the adapted linear.

    Raises:
        AssertionError: If a promise is broken; says which.
    """
    base = make_base()
    with torch.no_grad():
        before = _tensor(base(x))
    pair = _expect_pair(factory, base)
    lora = LoRA(rank=RANK, alpha=ALPHA)
    layer = LoRALinear(base, pair, config=lora, factory=factory)
    y = _tensor(layer(x))
    _expect(torch.equal(y, before), "an adapter whose second matrix is zero changes the output")
    _expect(type(layer(x)) is type(base(x)), "the adapted linear returns another type")
    _check_training(layer, x)
    _check_product(layer, x, before, tolerance)
    _expect(factory.pair(nn.Embedding(2, 2), rank=1) is None, "an Embedding was taken for a linear")


def _expect_pair(factory: LinearFactory, base: nn.Module) -> tuple[nn.Module, nn.Module]:
    pair = factory.pair(base, rank=RANK)
    if pair is None:
        raise AssertionError(f"{type(base).__name__} was not taken for a linear")
    for linear, place in zip(pair, (0, 1), strict=True):
        weight = linear.get_parameter("weight")
        _expect(weight.shape[place] == RANK, f"a weight of shape {list(weight.shape)} lacks rank")
        _expect(len(list(linear.parameters())) == 1, "an adapter has more than its matrix")
        same = weight.device == base.get_parameter("weight").device
        _expect(same, "an adapter is on another device than its base")
    return pair


def _check_training(layer: LoRALinear, x: Tensor) -> None:
    """Check that both matrices train and the base does not."""
    a, b = (linear.get_parameter("weight") for linear in (layer.lora_a, layer.lora_b))
    nn.init.normal_(b)
    torch.autograd.backward(_tensor(layer(x)).square().mean())
    for name, weight in (("first", a), ("second", b)):
        good = weight.grad is not None and bool(weight.grad.any())
        _expect(good, f"the {name} matrix gets no gradient")
    _expect(all(p.grad is None for p in layer.base.parameters()), "the base gets a gradient")


def _check_product(layer: LoRALinear, x: Tensor, before: Tensor, tolerance: float) -> None:
    """Check that the low-rank path is ``alpha / rank`` times ``B A x``, merged or beside."""
    with torch.no_grad():
        beside = _tensor(layer(x))
        layer.scale *= 2
        doubled = _tensor(layer(x))
        layer.scale /= 2
        layer.merge()
        merged = _tensor(layer(x))
        kind = layer.base.get_parameter("weight").dtype
        layer.unmerge()
        after = _tensor(layer(x))
    scale = beside.abs().max()
    moved = (beside - before).abs().max()
    _expect(bool(moved > 10 * tolerance * scale), "the adapter has no effect")
    error = (doubled - before - 2 * (beside - before)).abs().max()
    _expect(bool(error <= 4 * tolerance * scale), "the output is not linear in the scale")
    error = (merged - beside).abs().max()
    _expect(bool(error <= tolerance * scale), f"merging changes the output by {error:.1e}")
    _expect(torch.equal(after, beside), "unmerging does not restore the output")
    _expect(kind == layer.weight.dtype, "merging changes the dtype of the weight")


def _tensor(output: Any) -> Tensor:
    """Return the main tensor of what a linear returns."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
