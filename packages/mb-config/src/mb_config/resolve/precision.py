# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: from a name to dtypes of model, optimizer and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_config.precisions import find_precision, precision_names
from mb_config.sections.precision import MixedPrecisionConfig
from mb_config.suggestions import did_you_mean

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft


def resolve(draft: Draft) -> None:
    """Turn a name into a section and hand its values to model, optimizer and ddp."""
    name = draft.config.mixed_precision
    if isinstance(name, str):
        made = find_precision(name)
        if made is None:
            names = precision_names()
            near = did_you_mean(name.replace("-", "_"), names)
            remedy = near if near.startswith("did") else "choose one of them"
            draft.deny("mixed_precision", f"must be one of {', '.join(names)}", remedy)
            return
        draft.derive("mixed_precision", made, f"the name {name!r}")
    _dtypes(draft)
    _optimizer(draft)
    _gradients(draft)
    _low_precision(draft)


def _dtypes(draft: Draft) -> None:
    model, mixed = draft.config.model, draft.config.mixed_precision
    section = mixed if isinstance(mixed, MixedPrecisionConfig) else None
    source = "mixed_precision" if section else "mixed_precision is null"
    for flag in ("bf16", "fp16"):
        wanted = bool(getattr(section, flag, False))
        draft.fill(f"model.{flag}", wanted, f"{source}, {flag} {_word(wanted)}")
        if section is not None:
            draft.require(
                getattr(model, flag) == wanted,
                f"model.{flag}",
                f"must agree with mixed_precision.{flag}={wanted}",
                f"leave model.{flag} out, or change mixed_precision",
            )
    if not draft.require(
        not (model.bf16 and model.fp16),
        "model.bf16",
        "bf16 and fp16 exclude each other",
        "set one of them to false",
    ):
        return
    half = "bfloat16" if model.bf16 else "float16" if model.fp16 else "float32"
    params = (section.params_dtype if section else None) or half
    draft.fill("model.params_dtype", params, f"bf16 {model.bf16}, fp16 {model.fp16}")
    draft.require(
        model.params_dtype in ("float32", half),
        "model.params_dtype",
        f"must be float32 or the compute dtype, here {half}",
        "leave it out, or change mixed_precision",
    )
    _pipeline_dtype(draft, half, section)


def _pipeline_dtype(draft: Draft, half: str, section: MixedPrecisionConfig | None) -> None:
    model = draft.config.model
    sent = "float32" if model.fp32_residual_connection else half
    why = "fp32_residual_connection" if model.fp32_residual_connection else f"activations {half}"
    draft.fill("model.pipeline_dtype", (section.pipeline_dtype if section else None) or sent, why)
    draft.require(
        model.pipeline_dtype == sent or model.pipeline_model_parallel_size == 1,
        "model.pipeline_dtype",
        f"must be {sent}, the dtype the stages really send",
        "leave it out",
    )


def _optimizer(draft: Draft) -> None:
    model, optimizer = draft.config.model, draft.config.optimizer
    for name in ("bf16", "fp16", "params_dtype"):
        value = getattr(model, name)
        draft.fill(f"optimizer.{name}", value, f"model.{name}")
        draft.require(
            getattr(optimizer, name) == value,
            f"optimizer.{name}",
            f"must equal model.{name}={value}",
            "leave it out",
        )
    draft.require(
        optimizer.loss_scale is None or model.fp16 or model.bf16,
        "optimizer.loss_scale",
        "only fp16 and bf16 scale the loss",
        "leave it out, or set mixed_precision=fp16_mixed",
    )


def _gradients(draft: Draft) -> None:
    mixed = draft.config.mixed_precision
    section = mixed if isinstance(mixed, MixedPrecisionConfig) else None
    for name in ("grad_reduce_in_fp32", "fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"):
        wanted = bool(getattr(section, name, False))
        draft.fill(f"ddp.{name}", wanted, f"mixed_precision, {name} {_word(wanted)}")
    draft.require(
        not draft.config.ddp.reuse_grad_buf_for_mxfp8_param_ag or draft.config.ddp.fp8_param_gather,
        "ddp.reuse_grad_buf_for_mxfp8_param_ag",
        "needs ddp.fp8_param_gather",
        "set ddp.fp8_param_gather=true",
    )


def _low_precision(draft: Draft) -> None:
    mixed, model = draft.config.mixed_precision, draft.config.model
    if not isinstance(mixed, MixedPrecisionConfig):
        return
    at = "mixed_precision"
    draft.require(not (mixed.fp8 and mixed.fp4), f"{at}.fp4", "excludes fp8", "unset one of them")
    draft.require(
        mixed.fp8 or not mixed.fp8_param, f"{at}.fp8_param", "needs fp8", f"set {at}.fp8=hybrid"
    )
    draft.require(
        mixed.fp4 or not mixed.fp4_param, f"{at}.fp4_param", "needs fp4", f"set {at}.fp4=e2m1"
    )
    low = mixed.fp8 or mixed.fp4
    if not low:
        return
    name = f"{at}.fp8" if mixed.fp8 else f"{at}.fp4"
    draft.require(
        model.bf16 or model.fp16, name, "needs bf16 or fp16 beside it", f"set {at}.bf16=true"
    )
    draft.require(
        model.layer_spec != "torch",
        name,
        "needs Transformer Engine layers",
        "set model.layer_spec=te, or choose bf16_mixed",
    )
    draft.require(draft.config.dist.device != "cpu", name, "needs CUDA", "choose bf16_mixed")
    draft.require(
        not (mixed.first_last_layers_bf16 and mixed.fp8 and mixed.fp8_recipe == "delayed"),
        f"{at}.first_last_layers_bf16",
        "does not go with delayed scaling",
        f"set {at}.fp8_recipe=tensorwise",
    )
    most = model.num_layers // model.pipeline_model_parallel_size
    for end in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        draft.require(
            not mixed.first_last_layers_bf16 or getattr(mixed, end) <= most,
            f"{at}.{end}",
            f"must be at most the {most} layers of a pipeline stage",
            "choose a smaller number",
        )


def check_sizes(draft: Draft) -> None:
    """Check that products in FP8 and FP4 get sizes that their kernels take.

    Source: transformer_engine/pytorch/utils.py, ``assert_dim_for_fp8_exec``: 16 for operands, and
    32 where a scale is for 32 values (OCP Microscaling 1.0) and in FP4.
    """
    mixed, model = draft.config.mixed_precision, draft.config.model
    if not isinstance(mixed, MixedPrecisionConfig) or not (mixed.fp8 or mixed.fp4):
        return
    unit = 32 if mixed.fp4 or mixed.fp8_recipe == "mxfp8" else 16
    kind, tp = ("FP4" if mixed.fp4 else "FP8"), model.tensor_model_parallel_size
    split = f"{unit} x TP = {unit * tp}" if tp > 1 else f"{unit}"
    for name, step, text in (
        ("hidden_size", unit, f"{unit}"),
        ("ffn_hidden_size", unit * tp, split),
    ):
        size = getattr(model, name) or 0
        draft.require(
            size % step == 0,
            f"model.{name}",
            f"products in {kind} need a multiple of {text}",
            f"use {-(-size // step) * step}",
        )
    ranks = model.context_parallel_size * (tp if model.sequence_parallel else 1)
    tokens = model.seq_length * draft.config.train.micro_batch_size // ranks
    draft.require(
        tokens % unit == 0,
        "model.seq_length",
        f"a rank's micro-batch has {tokens} tokens, products in {kind} need a multiple of {unit}",
        "choose such a length or train.micro_batch_size",
    )


def _word(flag: bool) -> str:
    return "on" if flag else "off"
