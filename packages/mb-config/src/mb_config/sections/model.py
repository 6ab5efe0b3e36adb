# SPDX-License-Identifier: Apache-2.0
"""The model: architecture, how it is split over ranks, experts, kernels."""

from __future__ import annotations

from typing import Any, Literal

from attrs import define, field

from mb_config._fields import derived, number, within
from mb_config._types import check_all, checked, concise

DTypeName = Literal["float32", "bfloat16", "float16"]


@define(kw_only=True, on_setattr=checked)
class ModelConfig:
    """A GPT-like decoder; the defaults are those of the Llama family, sizes must be given.

    Names are those of megatron-core's ``TransformerConfig`` wherever it has the field.

    Attributes:
        num_layers: Transformer layers in the whole model; required.
        hidden_size: Width of the residual stream; required.
        num_attention_heads: Query heads in the whole model; required.
        num_query_groups: Key and value heads; null means as many as query heads.
        kv_channels: Width of one head; null means hidden_size / num_attention_heads.
        ffn_hidden_size: Inner width of the MLP; null means 4 x hidden_size, or for a gated MLP
            8/3 x hidden_size rounded down to a multiple of 64 (at least 64).
        seq_length: Tokens of one training sample; required.
        max_position_embeddings: Longest sequence the positions reach; null means seq_length.
        vocab_size: Tokens the tokenizer knows; null means taken from the tokenizer.
        padded_vocab_size: Derived: vocab_size rounded up to a multiple of
            lcm(make_vocab_size_divisible_by, tensor_model_parallel_size).
        make_vocab_size_divisible_by: The embedding has a multiple of this many rows, which makes
            its size the same in every layout whose tensor parallel size divides it.
        position_embedding_type: How positions enter.
        rotary_base: Base of the rotary frequencies.
        rotary_percent: Part of each head that is rotated.
        rotary_interleaved: Rotate pairs of neighbours instead of halves.
        rotary_base_local: Base of the layers with window_size; null means rotary_base. They are not
            stretched by rope_scaling.
        rope_scaling: Stretch rotary positions to longer sequences: all frequencies alike (linear),
            or low ones alone (llama3); null does not.
        rope_scaling_factor: By how much rope_scaling divides frequencies.
        rope_low_freq_factor: llama3: turns within the first length below which a frequency is
            divided in full.
        rope_high_freq_factor: llama3: turns within the first length above which it is kept.
        rope_original_max_positions: llama3: longest sequence of the first training.
        normalization: Kind of norm.
        layernorm_epsilon: Added to the variance in norms.
        layernorm_zero_centered_gamma: Store norm weights as offset from 1.
        qk_layernorm: Normalize queries and keys.
        normalize_branch_outputs: Normalize what attention and MLP give before it is added to the
            residual stream, besides their input.
        embedding_scale: Multiplies the embedding of a token; null leaves it.
        activation_func: Activation of the MLP; gelu_tanh is the approximation of gelu by tanh.
        gated_linear_unit: Multiply the activation with a second projection (SwiGLU with silu).
        add_bias_linear: Give the linears of attention and MLP a bias.
        add_qkv_bias: Give the query, key and value projection a bias.
        attention_output_bias: Give the output projection of attention a bias.
        share_embeddings_and_output_weights: Use one matrix for input and output tokens.
        hidden_dropout: Dropout on the residual branches and the embedding.
        attention_dropout: Dropout on attention probabilities.
        init_method_std: Standard deviation of initial weights.
        apply_residual_connection_post_layernorm: Take the residual after the norm.
        fp32_residual_connection: Keep the residual stream in float32.
        window_size: Sliding attention window (tokens left, tokens right); null attends to all.
        window_attn_skip_freq: Every n-th layer attends to all in spite of window_size, or a list of
            0 and 1 a layer, 1 for a layer with the window; null gives the window to every layer.
        attn_logit_softcapping: Bend attention scores to cap x tanh(score / cap); null leaves them.
        final_logit_softcapping: The same for the logits of the vocabulary.
        attention_softmax_in_fp32: Compute unfused attention softmax in float32.
        attention_backend: Which attention kernel; auto lets the layer decide.
        layer_spec: torch needs no Transformer Engine; auto takes te where it is installed on CUDA.
        torch_compile: Compile what the torch layers compute between matrix products (CUDA).
        deterministic_mode: Only deterministic kernels; slower.
        calculate_per_token_loss: Divide by all tokens of a step, so that how a batch is split over
            micro-batches and ranks does not weigh tokens differently.
        tensor_model_parallel_size: Ranks that share each layer's matrices (TP).
        pipeline_model_parallel_size: Stages the layers are cut into (PP).
        virtual_pipeline_model_parallel_size: Chunks of layers a stage holds (VPP); null does not
            interleave.
        num_layers_in_first_pipeline_stage: Layers of the first stage if it is to differ.
        num_layers_in_last_pipeline_stage: Layers of the last stage if it is to differ.
        account_for_embedding_in_pipeline_split: Count the embedding as a layer of the first stage.
        account_for_loss_in_pipeline_split: Count the output layer as a layer of the last stage.
        pipeline_model_parallel_layout: What each stage holds, such as ``"E|t*3|(t|)*3tt|m|L"``: E
            embedding, t layer, m prediction ahead, L loss; stages end with ``|``, ``x*n`` and
            ``(...)*n`` repeat. With more stages than ranks of a pipeline they are interleaved.
        context_parallel_size: Ranks that share each sequence (CP).
        cp_comm_type: How context parallel ranks exchange keys and values; a list names one a layer;
            null means p2p, and all_gather where that cannot be.
        hierarchical_context_parallel_sizes: Sizes of the levels for a2a+p2p; their product is CP.
        expert_model_parallel_size: Ranks that share the experts (EP).
        expert_tensor_parallel_size: TP within an expert; null means as outside.
        sequence_parallel: Split norms and dropout over the sequence among the TP ranks.
        num_moe_experts: Experts of a mixture-of-experts layer; null means a dense model.
        moe_router_topk: Experts a token is sent to.
        moe_ffn_hidden_size: Inner width of one expert; null means ffn_hidden_size.
        moe_router_load_balancing_type: How the router is kept balanced.
        moe_router_score_function: How router logits become scores.
        moe_router_pre_softmax: Take the softmax before choosing the top experts.
        moe_router_dtype: Precision of the routing; null means that of the activations.
        moe_router_num_groups: Groups of experts of which a token goes to few; null means no groups.
        moe_router_group_topk: Groups of experts a token goes to.
        moe_router_topk_scaling_factor: Multiplies the weights of the chosen experts.
        moe_router_enable_expert_bias: Balance by a bias on the choice that follows the load of each
            step, and changes no weight (needs moe_router_score_function sigmoid).
        moe_router_bias_update_rate: By how much that bias moves a step.
        moe_router_fusion: Fused routing kernels (Transformer Engine).
        moe_input_jitter_eps: Multiply the router's input with noise from 1 - eps to 1 + eps.
        moe_aux_loss_coeff: Weight of the load balancing loss.
        moe_z_loss_coeff: Weight of the router z-loss; null means none.
        moe_token_dispatcher_type: How tokens travel to experts.
        moe_flex_dispatcher_backend: Kernels of the flex dispatcher.
        moe_grouped_gemm: One grouped GEMM for the experts of a rank.
        moe_permute_fusion: Fused token permutation.
        moe_shared_expert_intermediate_size: Inner width of the shared expert; null means none.
        moe_shared_expert_overlap: Overlap the shared expert with the dispatch.
        moe_shared_expert_gate: Weigh the shared expert's output by a learnt gate.
        moe_expert_capacity_factor: Tokens an expert takes before it drops some; null never drops.
        moe_token_drop_policy: Which tokens a full expert keeps: the likeliest, or the first.
        moe_pad_expert_input_to_capacity: Send every expert its capacity, so that sizes are fixed;
            capacity is then counted rank by rank.
        moe_layer_freq: Every n-th layer has experts, or a list of 0 and 1 a layer.
        multi_latent_attention: Attention over compressed keys and values (MLA) as in DeepSeek-V2.
        q_lora_rank: MLA: width of compressed queries; null does not compress them.
        kv_lora_rank: MLA: width of compressed keys and values.
        qk_head_dim: MLA: width of a query and key head without positions.
        qk_pos_emb_head_dim: MLA: width of the rotated part of a query and key head.
        v_head_dim: MLA: width of a value head.
        rope_type: MLA: plain rotary positions, or stretched to longer sequences by YaRN.
        rotary_scaling_factor: MLA, yarn: by how much sequences are longer than at first.
        original_max_position_embeddings: MLA, yarn: longest sequence of the first training.
        beta_fast: MLA, yarn: turns within the first length above which a frequency is kept.
        beta_slow: MLA, yarn: turns below which a frequency is stretched in full.
        mscale: MLA, yarn: scales the rotated part.
        mscale_all_dim: MLA, yarn: scales attention scores.
        mtp_num_layers: Layers that predict further ahead, one token each; null means none.
        mtp_loss_scaling_factor: Weight of the mean of their losses.
        gradient_accumulation_fusion: Add weight gradients in the GEMM (needs Apex or TE on CUDA).
        bias_activation_fusion: Fused bias and activation.
        bias_dropout_fusion: Fused bias, dropout and residual.
        masked_softmax_fusion: Fused attention mask and softmax (CUDA).
        apply_rope_fusion: Fused rotary embedding (CUDA).
        persist_layer_norm: Persistent layer-norm kernel (Apex).
        cross_entropy_loss_fusion: Fused vocabulary-parallel cross-entropy.
        cross_entropy_fusion_impl: Whose fused cross-entropy.
        bf16: Derived from mixed_precision if null: parameters are bfloat16.
        fp16: Derived from mixed_precision if null: parameters are float16, the loss is scaled.
        params_dtype: Derived from bf16 and fp16 if null: dtype of the parameters.
        pipeline_dtype: Derived if null: dtype of what pipeline stages exchange.
        megatron: Any other field of megatron-core's ``TransformerConfig``, by name.
    """

    num_layers: int = number(0, ge=0)
    hidden_size: int = number(0, ge=0)
    num_attention_heads: int = number(0, ge=0)
    num_query_groups: int | None = number(None, ge=1)
    kv_channels: int | None = number(None, ge=1)
    ffn_hidden_size: int | None = number(None, ge=1)
    seq_length: int = number(0, ge=0)
    max_position_embeddings: int | None = number(None, ge=1)
    vocab_size: int | None = number(None, ge=1)
    padded_vocab_size: int | None = derived()
    make_vocab_size_divisible_by: int = number(128, ge=1)
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    rotary_base: int = number(10_000, ge=1)
    rotary_percent: float = number(1.0, gt=0, le=1)
    rotary_interleaved: bool = False
    rotary_base_local: int | None = number(None, ge=1)
    rope_scaling: Literal["linear", "llama3"] | None = None
    rope_scaling_factor: float = number(8.0, gt=0)
    rope_low_freq_factor: float = number(1.0, gt=0)
    rope_high_freq_factor: float = number(4.0, gt=0)
    rope_original_max_positions: int = number(8192, ge=1)
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    layernorm_epsilon: float = number(1e-5, gt=0)
    layernorm_zero_centered_gamma: bool = False
    qk_layernorm: bool = False
    normalize_branch_outputs: bool = False
    embedding_scale: float | None = number(None, gt=0)
    activation_func: Literal["silu", "gelu", "gelu_tanh", "relu", "squared_relu"] = "silu"
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    attention_output_bias: bool = False
    share_embeddings_and_output_weights: bool = False
    hidden_dropout: float = number(0.0, ge=0, lt=1)
    attention_dropout: float = number(0.0, ge=0, lt=1)
    init_method_std: float = number(0.02, gt=0)
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    window_size: tuple[int, int] | None = None
    window_attn_skip_freq: int | list[int] | None = field(default=None, metadata=within(ge=0))
    attn_logit_softcapping: float | None = number(None, gt=0)
    final_logit_softcapping: float | None = number(None, gt=0)
    attention_softmax_in_fp32: bool = True
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    layer_spec: Literal["auto", "torch", "te"] = "auto"
    torch_compile: bool = False
    deterministic_mode: bool = False
    calculate_per_token_loss: bool = True

    tensor_model_parallel_size: int = number(1, ge=1)
    pipeline_model_parallel_size: int = number(1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = number(None, ge=2)
    num_layers_in_first_pipeline_stage: int | None = number(None, ge=1)
    num_layers_in_last_pipeline_stage: int | None = number(None, ge=1)
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None
    context_parallel_size: int = number(1, ge=1)
    cp_comm_type: str | list[str] | None = None
    hierarchical_context_parallel_sizes: list[int] | None = field(
        default=None, metadata=within(ge=1)
    )
    expert_model_parallel_size: int = number(1, ge=1)
    expert_tensor_parallel_size: int | None = number(None, ge=1)
    sequence_parallel: bool = False

    num_moe_experts: int | None = number(None, ge=1)
    moe_router_topk: int = number(2, ge=1)
    moe_ffn_hidden_size: int | None = number(None, ge=1)
    moe_router_load_balancing_type: Literal[
        "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"
    ] = "aux_loss"
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    moe_router_num_groups: int | None = number(None, ge=1)
    moe_router_group_topk: int | None = number(None, ge=1)
    moe_router_topk_scaling_factor: float | None = number(None, gt=0)
    moe_router_enable_expert_bias: bool = False
    moe_router_bias_update_rate: float = number(1e-3, gt=0)
    moe_router_fusion: bool = False
    moe_input_jitter_eps: float | None = number(None, gt=0, lt=1)
    moe_aux_loss_coeff: float = number(0.0, ge=0)
    moe_z_loss_coeff: float | None = number(None, ge=0)
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "allgather"  # noqa: S105 - no password
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] = "deepep"
    moe_grouped_gemm: bool = False
    moe_permute_fusion: bool = False
    moe_shared_expert_intermediate_size: int | None = number(None, ge=1)
    moe_shared_expert_overlap: bool = False
    moe_shared_expert_gate: bool = False
    moe_expert_capacity_factor: float | None = number(None, gt=0)
    moe_token_drop_policy: Literal["probs", "position"] = "probs"  # noqa: S105 - no password
    moe_pad_expert_input_to_capacity: bool = False
    moe_layer_freq: int | list[int] = field(default=1, metadata=within(ge=0))

    multi_latent_attention: bool = False
    q_lora_rank: int | None = number(None, ge=1)
    kv_lora_rank: int = number(512, ge=1)
    qk_head_dim: int = number(128, ge=1)
    qk_pos_emb_head_dim: int = number(64, ge=1)
    v_head_dim: int = number(128, ge=1)
    rope_type: Literal["rope", "yarn"] = "rope"
    rotary_scaling_factor: float = number(40.0, ge=1)
    original_max_position_embeddings: int = number(4096, ge=1)
    beta_fast: float = number(32.0, gt=0)
    beta_slow: float = number(1.0, gt=0)
    mscale: float = number(1.0, ge=0)
    mscale_all_dim: float = number(0.0, ge=0)
    mtp_num_layers: int | None = number(None, ge=1)
    mtp_loss_scaling_factor: float = number(0.1, ge=0)

    gradient_accumulation_fusion: bool = False
    bias_activation_fusion: bool = False
    bias_dropout_fusion: bool = False
    masked_softmax_fusion: bool = False
    apply_rope_fusion: bool = False
    persist_layer_norm: bool = False
    cross_entropy_loss_fusion: bool = False
    cross_entropy_fusion_impl: Literal["native", "te"] = "native"

    bf16: bool | None = None
    fp16: bool | None = None
    params_dtype: DTypeName | None = None
    pipeline_dtype: DTypeName | None = None

    megatron: dict[str, Any] = field(factory=dict)

    __attrs_post_init__ = check_all
    __repr__ = concise
