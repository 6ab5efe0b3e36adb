# SPDX-License-Identifier: Apache-2.0
"""Which modules a transformer layer is made of: ``torch`` or ``te``.

Both build the same model and name its tensors alike in checkpoints: Transformer Engine keeps the
weight of a norm in the linear that follows it, so the torch spec files its own norms under that
linear's name.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from mb_engine.errors import EngineError
from mb_engine.model.attention import TorchAttention
from mb_engine.model.branch_linears import AttentionOutput
from mb_engine.model.expert_kernels import check_expert_kernels
from mb_engine.model.latent_attention import TorchLatentAttention
from mb_engine.model.linears import ColumnLinear, RowLinear
from mb_engine.model.mlp import TorchMLP
from mb_engine.model.moe_router import BalancedRouter
from mb_engine.model.norms import norm_class
from mb_engine.model.self_attention import TorchSelfAttention
from mb_engine.model.transformer_layer import TorchTransformerLayer
from mb_engine.runtime.megatron_compat import (
    dense_mlp_spec,
    expert_linears,
    is_moe_spec,
    moe_submodules,
)

if TYPE_CHECKING:
    from mb_config import ConfigContainer

_INPUT_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_LATENT_NORMS = {
    f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_"
    for x in ("q", "kv")
}
_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def choose_layer_spec(config: ConfigContainer) -> str:
    """Return ``"te"`` or ``"torch"``: what the model section asks for, or what fits the device.

    Args:
        config: Resolved.

    Raises:
        EngineError: If ``te`` is asked for where it cannot run.
    """
    on_cuda = torch.cuda.is_available()
    has_te = importlib.util.find_spec("transformer_engine") is not None
    wanted = config.model.layer_spec
    if wanted == "auto":
        return "te" if on_cuda and has_te else "torch"
    if wanted == "te" and not (on_cuda and has_te):
        why = "is for CUDA devices" if has_te else "is not installed"
        raise EngineError(
            f"model.layer_spec=te: Transformer Engine {why};"
            ' use model.layer_spec=torch, or pip install "mb-engine[te]" on a machine with CUDA'
        )
    return wanted


def block_spec(config: Any, *, layer_spec: str, vp_stage: int | None) -> Any:
    """Return the layers of this pipeline stage and the final norm.

    Args:
        config: Megatron-core's ``TransformerConfig``.
        layer_spec: ``"torch"`` or ``"te"``.
        vp_stage: Which model chunk of this stage; None without interleaving.

    Returns:
        Megatron-core's ``TransformerBlockSubmodules``.

    Raises:
        EngineError: If experts are to use kernels that are not there.
    """
    check_expert_kernels(config, layer_spec=layer_spec)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=layer_spec == "te",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    _use_own_modules(block.layer_specs, config, layer_spec=layer_spec)
    if layer_spec == "torch":
        block.layer_norm = norm_class(config.normalization)
    return block


def multi_token_spec(config: Any, *, layer_spec: str, vp_stage: int | None) -> Any:
    """Return the layers of this stage that predict further ahead, or None.

    They are like the last layer of the model.

    Args:
        config: Megatron-core's ``TransformerConfig``.
        layer_spec: ``"torch"`` or ``"te"``.
        vp_stage: Which model chunk of this stage; None without interleaving.
    """
    if not config.mtp_num_layers:
        return None
    te = layer_spec == "te"
    last = get_gpt_decoder_layer_specs(
        config, te, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )[-1]
    _use_own_modules([last], config, layer_spec=layer_spec)
    block = get_gpt_mtp_block_spec(
        config,
        TransformerBlockSubmodules(layer_specs=[last]),
        use_transformer_engine=te,
        vp_stage=vp_stage,
    )
    if block is not None and not te:
        norm = norm_class(config.normalization)
        for layer in block.layer_specs:
            parts = layer.submodules
            parts.enorm = parts.hnorm = parts.layer_norm = norm
            parts.eh_proj = ColumnLinear
    return block


def _use_own_modules(layers: list[Any], config: Any, *, layer_spec: str) -> None:
    """Put this package's modules in place of megatron-core's own in layer specs."""
    norm = norm_class(config.normalization)
    # Layers of one kind share one spec object.
    for layer in {id(spec): spec for spec in layers}.values():
        if is_moe_spec(layer.submodules.mlp):
            moe_submodules(layer.submodules.mlp).router = BalancedRouter
        if layer_spec == "torch":
            layer.module = TorchTransformerLayer
            _use_torch(layer.submodules, config, norm)


def _use_torch(layer: Any, config: Any, norm: type) -> None:
    """Put this package's modules in place of megatron-core's own in one layer spec."""
    layer.input_layernorm = norm
    layer.pre_mlp_layernorm = norm
    latent = config.multi_latent_attention
    layer.sharded_state_dict_keys_map = dict(_LATENT_NORMS if latent else _INPUT_NORM)
    if is_moe_spec(layer.mlp):
        for linears in expert_linears(layer.mlp):
            linears.linear_fc1, linears.linear_fc2 = ColumnLinear, RowLinear
    else:
        layer.sharded_state_dict_keys_map |= _MLP_NORM
        layer.mlp = dense_mlp_spec(TorchMLP, layer.mlp)
    attention = layer.self_attention.submodules
    attention.core_attention = TorchAttention
    if latent:
        _use_torch_latent(layer.self_attention, config, norm)
        return
    layer.self_attention.module = TorchSelfAttention
    attention.linear_qkv = ColumnLinear
    own_end = config.normalize_branch_outputs or config.attention_output_bias
    attention.linear_proj = AttentionOutput if own_end else RowLinear
    if config.qk_layernorm and not config.qk_l2_norm:
        attention.q_layernorm = norm
        attention.k_layernorm = norm


def _use_torch_latent(spec: Any, config: Any, norm: type) -> None:
    spec.module = TorchLatentAttention
    attention = spec.submodules
    attention.linear_q_proj = attention.linear_q_up_proj = ColumnLinear
    attention.linear_kv_up_proj = ColumnLinear
    attention.linear_proj = RowLinear
    normalized = config.qk_layernorm
    attention.kv_layernorm = norm if normalized else IdentityOp
    compressed = config.q_lora_rank is not None  # what is not compressed is not normalized
    attention.q_layernorm = norm if normalized and compressed else IdentityOp
