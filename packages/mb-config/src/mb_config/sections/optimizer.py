# SPDX-License-Identifier: Apache-2.0
"""The optimizer and loss scaling."""

from __future__ import annotations

from typing import Literal

from attrs import define, field

from mb_config._fields import number
from mb_config._types import check_all, checked, concise
from mb_config.sections.model import DTypeName


@define(kw_only=True, on_setattr=checked)
class OptimizerConfig:
    """Adam, SGD or Muon, with names as in megatron-core's ``OptimizerConfig``.

    adam_beta2 is 0.95, the usual value for language models (Touvron et al. 2023, arXiv:2302.13971),
    not megatron-core's 0.999. Muon (Jordan et al. 2024) takes the matrices of the layers, and Adam
    the embeddings, the output layer, biases and norms.

    Attributes:
        optimizer: Which optimizer; muon needs megatron-core 0.19 and emerging-optimizers.
        lr: Largest learning rate.
        min_lr: Smallest learning rate, reached at the end of the decay.
        weight_decay: Coefficient of weight decay.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        adam_eps: Added to the root of the second moment.
        decoupled_weight_decay: AdamW; false adds the decay to the gradient.
        sgd_momentum: Momentum of SGD.
        muon_momentum: Momentum of Muon.
        muon_nesterov: Nesterov's momentum in Muon.
        muon_split_qkv: Orthogonalize queries, keys and values apart.
        muon_scale_mode: How Muon's update is scaled to the shape of a matrix.
        muon_num_ns_steps: Newton-Schulz steps of one orthogonalization.
        muon_tp_mode: Whether tensor-parallel ranks orthogonalize their block alone, the gathered
            matrix each, or the matrix together.
        muon_extra_scale_factor: Multiplies Muon's update.
        overrides: For parameters whose name matches a pattern such as ``*.bias`` as a shell would,
            values of their own: max_lr, min_lr, start_wd, end_wd, wd_mult, lr_mult.
        clip_grad: Largest global gradient norm; 0 does not clip.
        use_distributed_optimizer: Share optimizer states among data-parallel ranks; null means as
            ddp.use_distributed_optimizer, else off.
        overlap_param_gather: Gather parameters while the forward pass runs; null means as
            ddp.overlap_param_gather, else off.
        overlap_param_gather_with_optimizer_step: Gather the first chunk during the update.
        log_num_zeros_in_grad: Count zeros in the gradient.
        use_precision_aware_optimizer: Keep states in the dtypes below (TE's FusedAdam).
        main_grads_dtype: dtype of main gradients.
        main_params_dtype: dtype of main parameters.
        exp_avg_dtype: dtype of first moments.
        exp_avg_sq_dtype: dtype of second moments.
        loss_scale: Constant loss scale; null means dynamic with fp16, none otherwise.
        initial_loss_scale: First dynamic loss scale.
        min_loss_scale: Smallest dynamic loss scale.
        loss_scale_window: Good steps before the dynamic scale doubles.
        hysteresis: Overflows before the dynamic scale halves.
        bf16: Derived from model.bf16 if null.
        fp16: Derived from model.fp16 if null.
        params_dtype: Derived from model.params_dtype if null.
    """

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    lr: float = number(3e-4, ge=0)
    min_lr: float = number(0.0, ge=0)
    weight_decay: float = number(0.01, ge=0)
    adam_beta1: float = number(0.9, ge=0, lt=1)
    adam_beta2: float = number(0.95, ge=0, lt=1)
    adam_eps: float = number(1e-8, gt=0)
    decoupled_weight_decay: bool = True
    sgd_momentum: float = number(0.9, ge=0, lt=1)
    muon_momentum: float = number(0.95, ge=0, lt=1)
    muon_nesterov: bool = False
    muon_split_qkv: bool = True
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    muon_num_ns_steps: int = number(5, ge=1)
    muon_tp_mode: Literal["blockwise", "duplicated", "distributed"] = "blockwise"
    muon_extra_scale_factor: float = number(1.0, gt=0)
    overrides: dict[str, dict[str, float]] = field(factory=dict)
    clip_grad: float = number(1.0, ge=0)
    use_distributed_optimizer: bool | None = None
    overlap_param_gather: bool | None = None
    overlap_param_gather_with_optimizer_step: bool = False
    log_num_zeros_in_grad: bool = False
    use_precision_aware_optimizer: bool = False
    main_grads_dtype: Literal["float32", "bfloat16"] = "float32"
    main_params_dtype: Literal["float32", "float16"] = "float32"
    exp_avg_dtype: Literal["float32", "bfloat16", "float16", "uint8"] = "float32"
    exp_avg_sq_dtype: Literal["float32", "bfloat16", "float16", "uint8"] = "float32"
    loss_scale: float | None = number(None, gt=0)
    initial_loss_scale: float = number(2.0**32, gt=0)
    min_loss_scale: float = number(1.0, gt=0)
    loss_scale_window: float = number(1000.0, ge=1)
    hysteresis: int = number(2, ge=1)
    bf16: bool | None = None
    fp16: bool | None = None
    params_dtype: DTypeName | None = None

    __attrs_post_init__ = check_all
    __repr__ = concise
