# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: its fields, and the named settings as data."""

from __future__ import annotations

from typing import Any, Final, Literal

from attrs import define

from mb_config._fields import number
from mb_config._types import check_all, checked, concise
from mb_config.sections.model import DTypeName


@define(kw_only=True, on_setattr=checked)
class MixedPrecisionConfig:
    """dtypes of parameters, gradients and GEMMs; finalize hands them to model, optimizer and ddp.

    The fp8 and fp4 fields stay here and have the names of megatron-core's ``TransformerConfig``.

    Attributes:
        bf16: Parameters and activations in bfloat16, main parameters in float32.
        fp16: The same in float16, with a scaled loss.
        params_dtype: dtype of parameters; null follows from bf16 and fp16.
        pipeline_dtype: dtype of what pipeline stages exchange; null means params_dtype.
        grad_reduce_in_fp32: Accumulate and reduce gradients in float32.
        fp8: FP8 format of GEMMs; null means none.
        fp8_recipe: How FP8 scales are found.
        fp8_param: Keep parameters in FP8.
        fp8_param_gather: Gather parameters in FP8.
        fp8_margin: Margin of the scaling factor.
        fp8_amax_history_len: Steps of amax history for delayed scaling.
        fp8_amax_compute_algo: How a scale follows from the history.
        fp8_wgrad: Weight gradients in FP8, too.
        fp8_dot_product_attention: Attention in FP8.
        fp8_multi_head_attention: Whole attention layer in FP8.
        first_last_layers_bf16: Keep the layers at both ends in bfloat16.
        num_layers_at_start_in_bf16: How many at the start.
        num_layers_at_end_in_bf16: How many at the end.
        fp4: FP4 format of GEMMs; null means none.
        fp4_recipe: How FP4 scales are found.
        fp4_param: Keep parameters in FP4.
        reuse_grad_buf_for_mxfp8_param_ag: Gather MXFP8 parameters in the gradient buffer.
    """

    bf16: bool = False
    fp16: bool = False
    params_dtype: DTypeName | None = None
    pipeline_dtype: DTypeName | None = None
    grad_reduce_in_fp32: bool = True
    fp8: Literal["e4m3", "hybrid"] | None = None
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "tensorwise"
    fp8_param: bool = False
    fp8_param_gather: bool = False
    fp8_margin: int = number(0, ge=0)
    fp8_amax_history_len: int = number(1, ge=1)
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    fp8_wgrad: bool = True
    fp8_dot_product_attention: bool = False
    fp8_multi_head_attention: bool = False
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: int = number(0, ge=0)
    num_layers_at_end_in_bf16: int = number(0, ge=0)
    fp4: Literal["e2m1"] | None = None
    fp4_recipe: Literal["nvfp4"] = "nvfp4"
    fp4_param: bool = False
    reuse_grad_buf_for_mxfp8_param_ag: bool = False

    __attrs_post_init__ = check_all
    __repr__ = concise


_BF16: Final[dict[str, Any]] = {"bf16": True}
_FP16: Final[dict[str, Any]] = {"fp16": True, "grad_reduce_in_fp32": False}
_PARAM: Final[dict[str, Any]] = {"fp8_param": True, "fp8_param_gather": True}
_DELAYED: Final[dict[str, Any]] = {
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
    **_PARAM,
}
_MXFP8: Final[dict[str, Any]] = {
    "fp8": "e4m3",
    "fp8_recipe": "mxfp8",
    "reuse_grad_buf_for_mxfp8_param_ag": True,
    **_PARAM,
}
_CURRENT: Final[dict[str, Any]] = {"fp8": "hybrid", "fp8_recipe": "tensorwise", **_PARAM}
_SUBCHANNEL: Final[dict[str, Any]] = {"fp8": "hybrid", "fp8_recipe": "blockwise"}


def _ends(start: int, end: int) -> dict[str, Any]:
    return {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }


PRECISIONS: Final[dict[str, dict[str, Any]]] = {
    "fp32": {"grad_reduce_in_fp32": True},
    "bf16_mixed": _BF16,
    "fp16_mixed": _FP16,
    "bf16_with_fp8_delayed_scaling_mixed": _BF16 | _DELAYED,
    "fp16_with_fp8_delayed_scaling_mixed": _FP16 | _DELAYED,
    "bf16_with_mxfp8_mixed": _BF16 | _MXFP8,
    "fp16_with_mxfp8_mixed": _FP16 | _MXFP8,
    "bf16_with_fp8_current_scaling_mixed": _BF16 | _CURRENT | _ends(1, 1),
    "fp16_with_fp8_current_scaling_mixed": _FP16 | _CURRENT | _ends(1, 1),
    "bf16_with_fp8_subchannel_scaling_mixed": _BF16 | _SUBCHANNEL,
    "fp16_with_fp8_subchannel_scaling_mixed": _FP16 | _SUBCHANNEL,
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": _BF16 | _CURRENT | _ends(2, 2),
    "nanov2_bf16_with_fp8_current_scaling_mixed": _BF16 | _SUBCHANNEL | _PARAM | _ends(2, 2),
    "bf16_with_nvfp4_mixed": _BF16 | {"fp4": "e2m1", "fp4_param": True},
    "nemotron_3_super_bf16_with_nvfp4_mixed": _BF16 | {"fp4": "e2m1"} | _ends(0, 14),
}
"""What each named precision sets; everything else is as in ``MixedPrecisionConfig``."""
