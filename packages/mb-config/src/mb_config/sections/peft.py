# SPDX-License-Identifier: Apache-2.0
"""Parameter-efficient finetuning: variants told apart by ``type:``."""

from __future__ import annotations

from typing import Literal, Protocol

from attrs import define, field

from mb_config._fields import number
from mb_config._types import check_all, checked, concise


class PEFTConfig(Protocol):
    """Any variant: an attrs class under the entry-point group ``mb.peft_configs``.

    Its name there is its ``type:`` and also names the transform in ``mb.model_transforms``.
    """

    target_modules: list[str]


@define(kw_only=True, on_setattr=checked)
class LoRA:
    """Low-rank adapters beside linears (``type: lora``); Hu et al. 2021, arXiv:2106.09685.

    Attributes:
        rank: Inner width of an adapter.
        alpha: The adapter's output is scaled by alpha / rank.
        dropout: Dropout probability in the adapter.
        dropout_position: pre drops the adapter's input, post its output.
        target_modules: Names or patterns with * of the linears to adapt.
        exclude_modules: Names or patterns with * of linears to leave alone.
        lora_A_init_method: How the first matrix starts.
        lora_B_init_method: How the second matrix starts; zero leaves the model as it was.
    """

    rank: int = number(16, ge=1)
    alpha: float = number(32.0, gt=0)
    dropout: float = number(0.0, ge=0, lt=1)
    dropout_position: Literal["pre", "post"] = "pre"
    target_modules: list[str] = field(
        factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    exclude_modules: list[str] = field(factory=list)
    lora_A_init_method: Literal["xavier", "normal", "kaiming", "zero"] = (  # noqa: N815
        "xavier"
    )
    lora_B_init_method: Literal["xavier", "normal", "kaiming", "zero"] = "zero"  # noqa: N815

    __attrs_post_init__ = check_all
    __repr__ = concise
