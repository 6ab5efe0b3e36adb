# SPDX-License-Identifier: Apache-2.0
"""What the planner does not compute: an error that names the field, rather than a wrong number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from mb_config.errors import ConfigError, Violation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import ConfigContainer

# Fields of the model section that the planner reads, or that change none of its numbers.
_MODEL = frozenset(
    [
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
        "seq_length",
        "max_position_embeddings",
        "vocab_size",
        "padded_vocab_size",
        "make_vocab_size_divisible_by",
        "position_embedding_type",
        "rotary_base",
        "rotary_percent",
        "rotary_interleaved",
        "normalization",
        "layernorm_epsilon",
        "layernorm_zero_centered_gamma",
        "qk_layernorm",
        "activation_func",
        "gated_linear_unit",
        "add_bias_linear",
        "add_qkv_bias",
        "share_embeddings_and_output_weights",
        "hidden_dropout",
        "attention_dropout",
        "init_method_std",
        "window_size",
        "window_attn_skip_freq",
        "attention_softmax_in_fp32",
        "attention_backend",
        "layer_spec",
        "deterministic_mode",
        "calculate_per_token_loss",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "context_parallel_size",
        "cp_comm_type",
        "hierarchical_context_parallel_sizes",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "sequence_parallel",
        "num_moe_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_router_load_balancing_type",
        "moe_router_score_function",
        "moe_router_pre_softmax",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "pipeline_model_parallel_layout",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_router_topk_scaling_factor",
        "moe_router_bias_update_rate",
        "moe_router_enable_expert_bias",
        "moe_token_drop_policy",
        "moe_flex_dispatcher_backend",
        "moe_router_dtype",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_token_dispatcher_type",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_overlap",
        "moe_layer_freq",
        "gradient_accumulation_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "apply_rope_fusion",
        "persist_layer_norm",
        "cross_entropy_loss_fusion",
        "cross_entropy_fusion_impl",
        "bf16",
        "fp16",
        "params_dtype",
        "pipeline_dtype",
        "megatron",
        "multi_latent_attention",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
        "rope_type",
        "rotary_scaling_factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "mtp_num_layers",
        "mtp_loss_scaling_factor",
        "rotary_base_local",
        "rope_scaling",
        "rope_scaling_factor",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
        "rope_original_max_positions",
        "normalize_branch_outputs",
        "attention_output_bias",
        "embedding_scale",
        "apply_residual_connection_post_layernorm",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "fp32_residual_connection",
        "moe_shared_expert_gate",
        "moe_router_fusion",
        "moe_input_jitter_eps",
        "moe_expert_capacity_factor",
        "moe_pad_expert_input_to_capacity",
        "torch_compile",
    ]
)
_DDP = frozenset(
    [
        "grad_reduce_in_fp32",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "align_param_gather",
        "use_distributed_optimizer",
        "num_distributed_optimizer_instances",
        "check_for_nan_in_grad",
        "check_for_large_grads",
        "bucket_size",
        "pad_buckets_for_high_nccl_busbw",
        "average_in_collective",
        "data_parallel_sharding_strategy",
        "suggested_communication_unit_size",
        "use_megatron_fsdp",
        "fsdp_double_buffer",
        "fp8_param_gather",
        "reuse_grad_buf_for_mxfp8_param_ag",
    ]
)
_OPTIMIZER = frozenset({"adam", "sgd", "muon"})
# Fields of megatron-core's TransformerConfig that change neither sizes nor what is sent.
_HARMLESS = frozenset(
    [
        "init_method_std",
        "output_layer_init_method_std",
        "embedding_init_method_std",
        "use_cpu_initialization",
        "perform_initialization",
        "softmax_scale",
        "apply_query_key_layer_scaling",
        "layernorm_epsilon",
        "moe_router_topk_scaling_factor",
        "moe_per_layer_logging",
        "variable_seq_lengths",
        "timers",
        "batch_p2p_sync",
        "barrier_with_L1_time",
        "rotary_scaling",
    ]
)


def refuse_unknown(config: ConfigContainer) -> None:
    """Refuse a resolved configuration that asks for what the planner does not compute.

    Raises:
        ConfigError: Naming every such field.
    """
    found = list(_violations(config))
    if found:
        raise ConfigError.from_violations(found)


def _violations(config: ConfigContainer) -> Iterator[Violation]:
    yield from _unread("model", config.model, _MODEL)
    yield from _unread("ddp", config.ddp, _DDP)
    for name, value in config.model.megatron.items():
        if name not in _HARMLESS:
            yield _violation(f"model.megatron.{name}", value, "it may change sizes")
    if config.optimizer.optimizer not in _OPTIMIZER:
        yield _violation(
            "optimizer.optimizer",
            config.optimizer.optimizer,
            "its state is not that of adam, sgd or muon",
        )
    if config.peft is not None:
        yield _violation("peft", "set", "it freezes parameters and adds others")


def _unread(name: str, section: Any, known: frozenset[str]) -> Iterator[Violation]:
    """Yield fields that are not in *known* and do not have their default."""
    for field in attrs.fields(type(section)):
        if field.name in known or not field.init:
            continue
        value = getattr(section, field.name)
        default = field.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        if value != default and (value or default):
            yield _violation(f"{name}.{field.name}", value, "it may change sizes")


def _violation(
    field: str, value: object, why: str, remedy: str = "leave it out to plan without it"
) -> Violation:
    return Violation(
        field=field,
        value=str(value),
        rule=f"is not modelled by the planner, as {why}",
        remedy=remedy,
    )
