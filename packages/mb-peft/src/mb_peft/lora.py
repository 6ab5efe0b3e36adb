# SPDX-License-Identifier: Apache-2.0
"""Low-rank adaptation of linears.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1, eq. 3: ``h = W0 x + (alpha / r) B A x``, with
``W0`` frozen.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mb_peft.errors import PeftError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import LoRA
    from torch import Tensor

    from mb_peft.interfaces import LinearFactory

NORMAL_STD = 0.2


class LoRALinear(nn.Module):
    """A frozen linear with a trainable low-rank path beside it; called like the linear itself.

    Attributes:
        base: The linear.
        lora_a: ``[rank, in]``, in its ``weight``.
        lora_b: ``[out, rank]``, in its ``weight``.
        rank: Inner width.
        scale: ``alpha / rank``, the factor on the low-rank path.
        dropout: Probability.
        enabled: False makes this the base alone.
    """

    def __init__(
        self,
        base: nn.Module,
        pair: tuple[nn.Module, nn.Module],
        *,
        config: LoRA,
        factory: LinearFactory,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.lora_a, self.lora_b = pair
        self.rank = config.rank
        self.dropout = config.dropout
        self.scale = config.alpha / config.rank
        self.enabled = True
        self._drop = nn.Dropout(config.dropout)
        self._drop_input = config.dropout_position == "pre"
        self._factory = factory
        self._unmerged: nn.Parameter | None = None
        self._merged = False
        initialize(self.lora_a.get_parameter("weight"), config.lora_A_init_method)
        initialize(self.lora_b.get_parameter("weight"), config.lora_B_init_method)

    def forward(self, x: Tensor) -> Any:
        """Return what the base returns, with the scaled low-rank product added to it."""
        if self._merged or not self.enabled:
            return self.base(x)
        return self._factory.call(self.base, x, self._adapter)

    def _adapter(self, x: Tensor) -> Tensor:
        h = self.lora_b(self.lora_a(self._drop(x) if self._drop_input else x))
        y: Tensor = self.scale * (h if self._drop_input else self._drop(h))
        return y

    @property
    def weight(self) -> Tensor:
        """The weight of the base, for code that looks at a linear's dtype or device."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base, if it has one."""
        return dict(self.base.named_parameters(recurse=False)).get("bias")

    @property
    def merged(self) -> bool:
        """Whether the weight of the base has the low-rank product in it."""
        return self._merged

    @property
    def reversible(self) -> bool:
        """Whether the weight of the base without the low-rank product is still there."""
        return not self._merged or self._unmerged is not None

    def delta(self) -> Tensor:
        """Return ``scale * B A``, ``[out, in]``, in float32 or the weights' wider dtype."""
        a, b = self.lora_a.get_parameter("weight"), self.lora_b.get_parameter("weight")
        dtype = torch.promote_types(a.dtype, torch.float32)
        return self.scale * (b.detach().to(dtype) @ a.detach().to(dtype))

    def merge(self, *, reversible: bool = True) -> None:
        """Put the low-rank product into the base's weight; nothing if it is there.

        The base gets a new parameter, so that a weight tied to it elsewhere keeps its values.

        Args:
            reversible: Keep the old weight for ``unmerge``, as much memory again.
        """
        if self._merged:
            return
        old = self.base.get_parameter("weight")
        new = nn.Parameter(self._factory.merged(self.base, self.delta()), requires_grad=False)
        self.base.weight = new
        self._unmerged = old if reversible else None
        self._merged = True

    def unmerge(self) -> None:
        """Put the base's own weight back, bit for bit; nothing if it is there.

        Raises:
            PeftError: If the merge was not reversible.
        """
        if not self._merged:
            return
        if self._unmerged is None:
            raise PeftError("was merged with reversible=False, so its old weight is gone")
        self.base.weight = self._unmerged
        self._unmerged = None
        self._merged = False

    def extra_repr(self) -> str:
        """Return the settings as words."""
        return f"rank={self.rank}, scale={self.scale:g}, merged={self._merged}"


def initialize(weight: Tensor, method: str) -> None:
    """Fill the matrix of an adapter.

    Args:
        weight: Filled in place.
        method: ``"xavier"`` (normal; Glorot and Bengio 2010, eq. 12 and 16), ``"kaiming"``
            (uniform in ``±1/sqrt(in)``, what Hugging Face PEFT does), ``"normal"`` (deviation 0.2),
            or ``"zero"``.
    """
    if method == "xavier":
        nn.init.xavier_normal_(weight)
    elif method == "kaiming":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    elif method == "normal":
        nn.init.normal_(weight, std=NORMAL_STD)
    else:
        nn.init.zeros_(weight)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted linears of *model* by name, in its order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let *model* be what it was without adapters, within a ``with`` block.

    Merged adapters are taken out of the weights and put back at the end.

    Raises:
        PeftError: If an adapter was merged with ``reversible=False``.
    """
    before = [(layer, layer.enabled, layer.merged) for layer in adapters(model).values()]
    try:
        for layer, _, _ in before:
            layer.unmerge()
            layer.enabled = False
        yield
    finally:
        for layer, enabled, merged in before:
            layer.enabled = enabled
            if merged:
                layer.merge()
