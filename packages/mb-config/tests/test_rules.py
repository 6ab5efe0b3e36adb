# SPDX-License-Identifier: Apache-2.0
"""Each rule between fields: what breaks it, which field it names, what it says."""

from __future__ import annotations

import re

import pytest
from mb_config import ConfigContainer, ConfigError

MOE = "model.num_moe_experts=4"
TP2 = "model.tensor_model_parallel_size=2"
PP2 = "model.pipeline_model_parallel_size=2"
VPP2 = "model.virtual_pipeline_model_parallel_size=2"
CP2 = "model.context_parallel_size=2"
WINDOW = "model.window_size=[8, 0]"
SP = "model.sequence_parallel=true"

# overrides of a valid configuration on 4 ranks; the field named; what the message says
BROKEN = [
    # model
    (["model.num_layers=0"], "model.num_layers", "must be set"),
    (["model.hidden_size=0"], "model.hidden_size", "must be set"),
    (["model.num_attention_heads=0"], "model.num_attention_heads", "must be set"),
    (["model.seq_length=0"], "model.seq_length", "must be set"),
    (["model.num_attention_heads=5", "model.kv_channels=16", "model.num_query_groups=1", TP2],
     "model.num_attention_heads", "multiple of tensor_model_parallel_size=2; use 6 heads"),
    (["model.num_query_groups=3"], "model.num_query_groups", "must divide num_attention_heads=4"),
    (["model.num_attention_heads=6", "model.num_query_groups=3", "model.kv_channels=16", TP2],
     "model.num_query_groups", "multiple or a divisor of tensor_model_parallel_size=2"),
    (["model.num_attention_heads=6", "model.num_query_groups=6"], "model.hidden_size",
     "multiple of num_attention_heads=6; use 66, or set model.kv_channels"),
    (["model.ffn_hidden_size=99", TP2], "model.ffn_hidden_size", "multiple of tensor.*use 100"),
    (["model.hidden_size=65", "model.kv_channels=16", TP2], "model.hidden_size", "use 66"),
    (["model.max_position_embeddings=16"], "model.max_position_embeddings", "at least seq_length=32"),
    (["model.kv_channels=15"], "model.kv_channels", "15 x rotary_percent 1.0 = 15 must be even"),
    (["model.rotary_percent=0.3"], "model.rotary_percent", "must be even"),
    (["model.padded_vocab_size=7", "model.vocab_size=100"], "model.padded_vocab_size",
     "is derived and would be 128"),
    (["tokenizer.tokenizer_type=null"], None, "must be one of"),
    (["tokenizer.tokenizer_type='null'"], "tokenizer.vocab_size", "needs the number of its tokens"),
    (["tokenizer.vocab_size=10"], "tokenizer.vocab_size", "only a null tokenizer"),
    (["tokenizer.tokenizer_type=huggingface"], "tokenizer.tokenizer_model", "folder or file"),
    (["tokenizer.tokenizer_type='null'", "tokenizer.vocab_size=10", "model.vocab_size=9"],
     "model.vocab_size", "must hold the tokenizer's 10 tokens"),
    (["model.cross_entropy_fusion_impl=te"], "model.cross_entropy_fusion_impl", "loss_fusion"),
    (["model.cross_entropy_loss_fusion=true", "model.deterministic_mode=true"],
     "model.cross_entropy_loss_fusion", "not deterministic"),
    (["model.bias_activation_fusion=true", "model.activation_func=relu"],
     "model.bias_activation_fusion", "gelu and silu alone"),
    (["model.bias_activation_fusion=true", "model.activation_func=gelu",
      "model.gated_linear_unit=false"], "model.bias_activation_fusion", "needs a bias"),
    (["model.layernorm_zero_centered_gamma=true", "model.layer_spec=torch"],
     "model.layernorm_zero_centered_gamma", "torch layers do not have it"),
    (["model.megatron.num_layers=3"], "model.megatron.num_layers", "model has a field of its own"),
    (["model.megatron.recompute_method=block"], "model.megatron.recompute_method",
     "recompute has a field of its own"),
    # parallelism
    (["model.tensor_model_parallel_size=3", "model.num_attention_heads=6", "model.num_query_groups=3",
      "model.hidden_size=66", "model.ffn_hidden_size=132", "model.kv_channels=16"],
     "model.tensor_model_parallel_size",
     r"world size 4 must be a multiple of TP x PP x CP = 3 x 1 x 1 = 3; start 6 ranks"),
    ([SP], "model.sequence_parallel", "needs tensor parallelism.*set model.sequence_parallel=false"),
    ([SP, TP2, "model.seq_length=31"], "model.seq_length", "TP x CP = 2 x 1.*use 32"),
    (["model.num_layers=5", PP2], "model.num_layers", "pipeline_model_parallel_size=2; use 6"),
    ([VPP2], "model.virtual_pipeline_model_parallel_size", "needs pipeline parallelism"),
    (["model.num_layers_in_first_pipeline_stage=1"], "model.num_layers_in_first_pipeline_stage",
     "needs pipeline parallelism"),
    ([PP2, "model.virtual_pipeline_model_parallel_size=3"],
     "model.virtual_pipeline_model_parallel_size", "divide the 2 layers of a pipeline stage"),
    ([PP2, "model.num_layers_in_first_pipeline_stage=4"], "model.num_layers_in_first_pipeline_stage",
     "leaves 0 of 4 layers for 1 other stages"),
    ([PP2, "model.num_layers_in_first_pipeline_stage=1", "model.num_layers_in_last_pipeline_stage=2"],
     "model.num_layers_in_first_pipeline_stage", "leaves 1 of 4 layers for 0 other stages"),
    ([PP2, VPP2, "model.num_layers_in_last_pipeline_stage=1"],
     "model.virtual_pipeline_model_parallel_size", "divide the 1 layers"),
    ([PP2, VPP2, "comm_overlap.overlap_p2p_comm=false"], "comm_overlap.overlap_p2p_comm",
     ("2 pipeline stages with virtual stages give wrong results unless overlap_p2p_comm=True and"
     " batch_p2p_comm=False")),
    ([PP2, VPP2, "comm_overlap.batch_p2p_comm=true"], "comm_overlap.batch_p2p_comm",
     "give wrong results"),
    (["model.pipeline_model_parallel_size=4", "comm_overlap.overlap_p2p_comm=true",
      "comm_overlap.batch_p2p_comm=true"], "comm_overlap.batch_p2p_comm", "excludes"),
    ([PP2, "comm_overlap.overlap_p2p_comm=true"], "comm_overlap.overlap_p2p_comm",
     "only the interleaved pipeline"),
    ([CP2, "model.seq_length=30"], "model.seq_length", "2 x context_parallel_size = 4; use 32"),
    (["model.cp_comm_type=p2p"], "model.cp_comm_type", "needs context parallelism"),
    ([CP2, "model.cp_comm_type=ring"], "model.cp_comm_type", "one of p2p, all_gather, a2a, a2a\\+p2p"),
    ([CP2, "model.cp_comm_type=[p2p, a2a]"], "model.cp_comm_type", "each of the 4 layers"),
    ([CP2, TP2, "model.cp_comm_type=a2a"], "model.cp_comm_type", "multiple of TP x CP = 4"),
    (["model.context_parallel_size=4", "model.cp_comm_type=a2a+p2p"],
     "model.hierarchical_context_parallel_sizes", "product is context_parallel_size=4.*\\[2, 2\\]"),
    ([CP2, "model.hierarchical_context_parallel_sizes=[2]"],
     "model.hierarchical_context_parallel_sizes", "only cp_comm_type a2a\\+p2p"),
    # attention
    (["model.window_attn_skip_freq=2"], "model.window_attn_skip_freq", "set model.window_size"),
    ([WINDOW, "model.window_attn_skip_freq=[0, 1]"], "model.window_attn_skip_freq",
     "a 0 or 1 for each of the 4 layers"),
    ([WINDOW, "model.window_attn_skip_freq=[0, 1, 2, 0]"], "model.window_attn_skip_freq",
     "a 0 or 1"),
    ([WINDOW, "model.window_attn_skip_freq=0"], "model.window_attn_skip_freq", "at least 1"),
    (["model.attn_logit_softcapping=50.0", "model.layer_spec=te"],
     "model.attn_logit_softcapping", "do not cap logits; set model.layer_spec=torch"),
    (["model.final_logit_softcapping=30.0", "model.layer_spec=te"],
     "model.final_logit_softcapping", "do not cap logits"),
    (["model.attn_logit_softcapping=50.0", "model.attention_dropout=0.1"],
     "model.attn_logit_softcapping", "attention_dropout=0.1"),
    ([CP2, WINDOW, "model.cp_comm_type=p2p"], "model.cp_comm_type",
     "no kernel for window_size=.*use all_gather"),
    ([CP2, "model.cp_comm_type=p2p", "model.attention_dropout=0.1", "model.layer_spec=torch"],
     "model.cp_comm_type", "does not drop.*use all_gather"),
    ([CP2, "model.cp_comm_type=a2a+p2p", "model.hierarchical_context_parallel_sizes=[2]",
      "model.layer_spec=torch"], "model.cp_comm_type", "by p2p, all_gather or a2a"),
    # experts
    (["model.expert_model_parallel_size=2"], "model.expert_model_parallel_size", "needs experts"),
    (["model.expert_tensor_parallel_size=1"], "model.expert_tensor_parallel_size", "needs experts"),
    (["model.num_moe_experts=3", "model.expert_model_parallel_size=2"], "model.num_moe_experts",
     "expert_model_parallel_size=2; use 4 experts"),
    (["model.num_moe_experts=8", "model.expert_model_parallel_size=8"],
     "model.expert_model_parallel_size", "expert TP x EP x PP = 8"),
    ([MOE, TP2], "model.sequence_parallel", "need sequence parallelism"),
    (["model.moe_ffn_hidden_size=8"], "model.moe_ffn_hidden_size", "needs experts"),
    (["model.moe_grouped_gemm=true"], "model.moe_grouped_gemm", "needs experts"),
    ([MOE, TP2, SP, "model.moe_ffn_hidden_size=7"], "model.moe_ffn_hidden_size", "parallel_size=2"),
    ([MOE, TP2, SP, "model.moe_shared_expert_intermediate_size=7"],
     "model.moe_shared_expert_intermediate_size", "multiple of tensor"),
    ([MOE, TP2, SP, "model.add_bias_linear=true"], "model.add_bias_linear", "cannot be split"),
    ([MOE, "model.moe_layer_freq=[0, 1]"], "model.moe_layer_freq", "list of 4 zeros and ones"),
    ([MOE, "model.moe_layer_freq=0"], "model.moe_layer_freq", "at least 1"),
    ([MOE, "model.moe_router_topk=5"], "model.moe_router_topk", "at most num_moe_experts=4"),
    ([MOE, "model.moe_router_topk=1"], "model.moe_router_topk", "no gradient.*pre_softmax=true"),
    ([MOE, "model.moe_aux_loss_coeff=0.1", "model.moe_router_load_balancing_type=none"],
     "model.moe_aux_loss_coeff", "has no effect"),
    ([MOE, "model.moe_expert_capacity_factor=1", "model.moe_router_load_balancing_type=sinkhorn"],
     "model.moe_expert_capacity_factor", "sinkhorn"),
    ([MOE, "model.moe_shared_expert_overlap=true"], "model.moe_shared_expert_overlap", "alltoall"),
    ([MOE, "comm_overlap.overlap_moe_expert_parallel_comm=true"],
     "comm_overlap.overlap_moe_expert_parallel_comm", "needs EP > 1"),
    # batches and duration
    (["train.global_batch_size=18"], "train.global_batch_size",
     "micro_batch_size 1 x data_parallel_size 4 = 4; use 16 or 20, or set train.decrease"),
    (["train.global_batch_size=2"], "train.global_batch_size", "use 4, a smaller micro_batch_size"),
    (["train.global_batch_size=2", "train.decrease_batch_size_if_needed=true"],
     "train.global_batch_size", "must be a multiple"),
    (["train.rampup_batch_size=[4, 4]"], "train.rampup_batch_size", "start, increment, samples"),
    (["train.rampup_batch_size=[20, 4, 100]"], "train.rampup_batch_size", "at or below global"),
    (["train.rampup_batch_size=[4, 5, 100]"], "train.rampup_batch_size",
     "increments of 5 from 4 never reach global_batch_size=16; choose .* divides 12"),
    (["train.rampup_batch_size=[4, 6, 100]"], "train.rampup_batch_size", "reaches 10, which must"),
    (["train.rampup_batch_size=[8, 4, 100]", PP2, VPP2], None, ""),
    (["train.rampup_batch_size=[2, 2, 100]", PP2, VPP2], "train.global_batch_size",
     r"its 1 micro-batches must be a multiple of the 2 pipeline stages .* \(ramp-up at 2\)"),
    (["train.global_batch_size=6", PP2, VPP2], "train.global_batch_size",
     "its 3 micro-batches must be a multiple of the 2 pipeline stages"),
    (["train.train_iters=null"], "train.train_iters", "exactly one of train_iters, train_samples"),
    (["train.train_samples=100"], "train.train_samples", "excludes train.train_iters"),
    (["train.train_iters=null", "train.train_samples=15"], "train.train_samples",
     "less than one step of 16 samples"),
    (["train.train_iters=null", "train.train_tokens=500"], "train.train_tokens", "less than one step"),
    (["train.num_microbatches=3"], "train.num_microbatches", "is derived and would be 4.*leave it"),
    (["train.data_parallel_size=3"], "train.data_parallel_size", "is derived and would be 4"),
    (["train.manual_gc_interval=5"], "train.manual_gc_interval", "no effect without manual_gc"),
    (["train.iterations_to_skip=[3, 101]"], "train.iterations_to_skip", "step 101 comes after"),
    # evaluation
    (["validation.eval_global_batch_size=6"], "validation.eval_global_batch_size",
     "eval_micro_batch_size 1 x data_parallel_size 4 = 4; use 4 or 8"),
    (["validation.eval_global_batch_size=6", PP2, VPP2], "validation.eval_global_batch_size",
     "its 3 micro-batches"),
    (["validation.start_eval_at_iter=5"], "validation.start_eval_at_iter", "without eval_interval"),
    (["validation.skip_train=true", "validation.eval_iters=0"], "validation.eval_iters", "do nothing"),
    # data
    (["dataset.split='90,20,0'"], "dataset.split", "add up to 100"),
    (["dataset.split='abc'"], "dataset.split", "percentages"),
    (["dataset.split='0,100,0'"], "dataset.split", "nothing to train on"),
    (["dataset.split='100,0,0'", "validation.eval_interval=5"], "dataset.split", "validate on"),
    (["dataset.seq_length=16"], "dataset.seq_length", "must equal model.seq_length=32"),
    (["dataset.type=mock", "dataset.num_validation_samples=0", "validation.eval_interval=5"],
     "dataset.num_validation_samples", "above 0"),
    # optimizer and data parallelism
    (["optimizer.min_lr=1.0"], "optimizer.min_lr", "at most optimizer.lr=0.0003"),
    (["optimizer.optimizer=sgd", "optimizer.use_distributed_optimizer=true"],
     "optimizer.optimizer", "for adam alone"),
    (["optimizer.use_distributed_optimizer=true", "ddp.use_distributed_optimizer=false"],
     "ddp.use_distributed_optimizer", "must equal optimizer.use_distributed_optimizer=True"),
    (["ddp.overlap_param_gather=true", "ddp.overlap_grad_reduce=true"], "ddp.overlap_param_gather",
     "needs use_distributed_optimizer"),
    (["ddp.overlap_param_gather=true", "ddp.use_distributed_optimizer=true",
      "ddp.overlap_grad_reduce=false"], "ddp.overlap_param_gather", "needs overlap_grad_reduce"),
    (["ddp.bucket_size=1000"], "ddp.bucket_size", "no effect without overlap_grad_reduce"),
    (["optimizer.muon_momentum=0.9"], "optimizer.muon_momentum", "no effect with optimizer=adam"),
    (["optimizer.optimizer=muon", "mixed_precision=fp16_mixed"], "optimizer.optimizer",
     "does not scale the loss.*use bf16_mixed"),
    (["optimizer.optimizer=muon", "optimizer.use_distributed_optimizer=true"],
     "optimizer.optimizer", "for adam alone"),
    (["optimizer.optimizer=muon", "offload={optimizer_cpu_offload: true}"],
     "offload.optimizer_cpu_offload", "adam"),
    (["optimizer.overrides={'*.bias': {lr: 1.0}}"], "optimizer.overrides",
     "sets lr, which.*max_lr, min_lr"),
    (["ddp.align_param_gather=true"], "ddp.align_param_gather", "needs overlap_param_gather"),
    (["optimizer.overlap_param_gather_with_optimizer_step=true"],
     "optimizer.overlap_param_gather_with_optimizer_step", "virtual pipeline stages"),
    (["ddp.num_distributed_optimizer_instances=2"], "ddp.num_distributed_optimizer_instances",
     "needs use_distributed_optimizer"),
    (["ddp.num_distributed_optimizer_instances=3", "ddp.use_distributed_optimizer=true"],
     "ddp.num_distributed_optimizer_instances", "must divide the data-parallel size 4"),
    (["optimizer.use_precision_aware_optimizer=true"], "optimizer.use_precision_aware_optimizer",
     "needs adam and the distributed optimizer"),
    (["optimizer.use_precision_aware_optimizer=true", "optimizer.use_distributed_optimizer=true",
      "dist.device=cpu"], "optimizer.use_precision_aware_optimizer", "needs CUDA"),
    (["optimizer.exp_avg_dtype=bfloat16"], "optimizer.exp_avg_dtype", "must be float32 without"),
    (["ddp.average_in_collective=true"], "ddp.average_in_collective", "calculate_per_token_loss"),
    # precision
    (["mixed_precision=bf16"], "mixed_precision", "must be one of fp32, bf16_mixed, fp16_mixed"),
    (["mixed_precision=bf16_mixed", "model.fp16=true"], "model.fp16", "must agree with mixed_prec"),
    (["model.bf16=true", "model.fp16=true"], "model.bf16", "exclude each other"),
    (["model.bf16=true", "model.params_dtype=float16"], "model.params_dtype", "here bfloat16"),
    (["model.bf16=true", "model.pipeline_dtype=float32", PP2], "model.pipeline_dtype",
     "must be bfloat16, the dtype the stages really send"),
    (["model.bf16=true", "optimizer.bf16=false"], "optimizer.bf16", "must equal model.bf16=True"),
    (["optimizer.loss_scale=2"], "optimizer.loss_scale", "only fp16 and bf16"),
    (["ddp.reuse_grad_buf_for_mxfp8_param_ag=true"], "ddp.reuse_grad_buf_for_mxfp8_param_ag",
     "fp8_param_gather"),
    (["mixed_precision.fp8=hybrid"], "mixed_precision.fp8", "needs bf16 or fp16"),
    (["mixed_precision={bf16: true, fp8: hybrid, fp4: e2m1}"], "mixed_precision.fp4", "excludes fp8"),
    (["mixed_precision={bf16: true, fp8_param: true}"], "mixed_precision.fp8_param", "needs fp8"),
    (["mixed_precision={bf16: true, fp4_param: true}"], "mixed_precision.fp4_param", "needs fp4"),
    (["mixed_precision=bf16_with_mxfp8_mixed", "model.layer_spec=torch"], "mixed_precision.fp8",
     "needs Transformer Engine layers"),
    (["mixed_precision=bf16_with_mxfp8_mixed", "dist.device=cpu"], "mixed_precision.fp8", "CUDA"),
    ([("mixed_precision={bf16: true, fp8: hybrid, fp8_recipe: delayed,"
      " first_last_layers_bf16: true}")], "mixed_precision.first_last_layers_bf16", "delayed"),
    (["mixed_precision=nemotron_3_super_bf16_with_nvfp4_mixed"],
     "mixed_precision.num_layers_at_end_in_bf16", "at most the 4 layers"),
    # schedule
    (["scheduler.lr_warmup_init=1.0"], "scheduler.lr_warmup_init", "at most optimizer.lr"),
    (["scheduler.lr_warmup_iters=100"], "scheduler.lr_warmup_iters",
     "its 1600 samples must be fewer than the 1600 of the decay"),
    (["scheduler.lr_warmup_samples=1600"], "scheduler.lr_warmup_samples", "fewer than the 1600"),
    (["scheduler.lr_warmup_iters=1", "scheduler.lr_warmup_samples=1"],
     "scheduler.lr_warmup_samples", "excludes scheduler.lr_warmup_iters"),
    (["scheduler.lr_warmup_iters=1", "scheduler.lr_warmup_fraction=0.1"],
     "scheduler.lr_warmup_iters", "excludes scheduler.lr_warmup_fraction"),
    (["scheduler.lr_decay_iters=1", "scheduler.lr_decay_samples=1"],
     "scheduler.lr_decay_samples", "excludes scheduler.lr_decay_iters"),
    (["scheduler.lr_decay_style=WSD"], "scheduler.lr_wsd_decay_iters", "length of its last phase"),
    (["scheduler.lr_wsd_decay_iters=5"], "scheduler.lr_wsd_decay_iters", "lr_decay_style=linear"),
    (["scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=95",
      "scheduler.lr_warmup_iters=10"], "scheduler.lr_wsd_decay_iters", "must fit into 1600"),
    (["scheduler.start_weight_decay=0.2"], "scheduler.start_weight_decay",
     "must equal optimizer.weight_decay=0.01"),
    (["scheduler.weight_decay_incr_style=linear", "scheduler.end_weight_decay=0.001"],
     "scheduler.start_weight_decay", "weight decay only grows"),
    (["scheduler.override_opt_param_scheduler=true",
      "scheduler.use_checkpoint_opt_param_scheduler=true"],
     "scheduler.override_opt_param_scheduler", "excludes use_checkpoint"),
    (["scheduler.use_checkpoint_opt_param_scheduler=true"],
     "scheduler.use_checkpoint_opt_param_scheduler", "needs a checkpoint"),
    (["scheduler.lr_decay_steps=5"], "scheduler.lr_decay_steps", "is derived and would be 1600"),
    # memory
    (["recompute.recompute_granularity=full"], "recompute.recompute_method", "full needs it"),
    (["recompute.recompute_granularity=full", "recompute.recompute_method=block"],
     "recompute.recompute_num_layers", "full needs it"),
    (["recompute.recompute_method=block"], "recompute.recompute_method", "granularity=null"),
    (["recompute.recompute_granularity=selective", "recompute.recompute_num_layers=1"],
     "recompute.recompute_num_layers", "granularity=selective"),
    (["recompute.recompute_modules=[mlp]"], "recompute.recompute_modules", "granularity=null"),
    (["recompute.recompute_granularity=full", "recompute.recompute_method=block",
      "recompute.recompute_num_layers=5"], "recompute.recompute_num_layers", "at most the 4 layers"),
    (["recompute.distribute_saved_activations=true"], "recompute.distribute_saved_activations",
     "needs recompute_granularity=full"),
    ([("recompute={recompute_granularity: full, recompute_method: block, recompute_num_layers: 1,"
      " distribute_saved_activations: true}"), TP2, SP], "recompute.distribute_saved_activations",
     "without sequence parallelism"),
    (["recompute={recompute_granularity: selective, recompute_modules: [moe]}"],
     "recompute.recompute_modules", "moe needs experts"),
    ([MOE, "recompute={recompute_granularity: selective, recompute_modules: [moe_act]}"],
     "recompute.recompute_modules", "moe_grouped_gemm"),
    (["recompute={recompute_granularity: selective, recompute_modules: [mla_up_proj]}"],
     "recompute.recompute_modules", "multi-latent"),
    ([MOE, "model.moe_shared_expert_intermediate_size=64", "model.moe_shared_expert_overlap=true",
      "model.moe_token_dispatcher_type=alltoall",
      "recompute={recompute_granularity: selective, recompute_modules: [shared_experts]}"],
     "recompute.recompute_modules", "excludes moe_shared_expert_overlap"),
    (["mixed_precision=bf16_with_fp8_delayed_scaling_mixed",
      "recompute={recompute_granularity: selective, recompute_modules: [layernorm]}"],
     "recompute.recompute_modules", "not recomputed with delayed scaling"),
    (["model.torch_compile=true", "model.layer_spec=te"], "model.torch_compile", "nothing to comp"),
    (["model.torch_compile=true", "dist.device=cpu"], "model.torch_compile", "needs CUDA"),
    (["offload.cpu_offloading_num_layers=1"], "offload.cpu_offloading_num_layers", "no effect"),
    (["offload.cpu_offloading=true"], "offload.cpu_offloading_num_layers", "between 1 and 3"),
    (["offload={cpu_offloading: true, cpu_offloading_num_layers: 1}", PP2], "offload.cpu_offloading",
     "excludes pipeline"),
    (["offload={cpu_offloading: true, cpu_offloading_num_layers: 1}",
      "recompute.recompute_granularity=selective"], "offload.cpu_offloading", "excludes recomp"),
    (["offload={cpu_offloading: true, cpu_offloading_num_layers: 1}", "model.layer_spec=torch"],
     "offload.cpu_offloading", "Transformer Engine"),
    (["offload={cpu_offloading: true, cpu_offloading_num_layers: 1}", "dist.device=cpu"],
     "offload.cpu_offloading", "needs CUDA"),
    (["offload.optimizer_offload_fraction=0.5"], "offload.optimizer_offload_fraction", "no effect"),
    (["offload.optimizer_cpu_offload=true", "optimizer.use_distributed_optimizer=true"],
     "offload.optimizer_offload_fraction", "above 0"),
    (["offload={optimizer_cpu_offload: true, optimizer_offload_fraction: 1}"],
     "offload.optimizer_cpu_offload", "needs the distributed optimizer"),
    (["offload={optimizer_cpu_offload: true, optimizer_offload_fraction: 1}", "dist.device=cpu",
      "optimizer.use_distributed_optimizer=true"], "offload.optimizer_cpu_offload", "fails on CPU"),
    (["offload={optimizer_cpu_offload: true, optimizer_offload_fraction: 1}",
      "optimizer.use_distributed_optimizer=true", "optimizer.decoupled_weight_decay=false"],
     "offload.optimizer_cpu_offload", "decoupled weight decay"),
    (["cuda_graph.cuda_graph_scope=[attn]"], "cuda_graph.cuda_graph_scope", "impl=none"),
    (["cuda_graph.cuda_graph_impl=local"], "cuda_graph.cuda_graph_impl", "rng.te_rng_tracker=true"),
    (["cuda_graph.cuda_graph_impl=local", "rng.te_rng_tracker=true", "dist.device=cpu"],
     "cuda_graph.cuda_graph_impl", "needs CUDA"),
    (["cuda_graph={cuda_graph_impl: transformer_engine, cuda_graph_scope: [full_iteration]}"],
     "cuda_graph.cuda_graph_scope", "local capture"),
    (["cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [full_iteration]}"],
     "train.check_for_nan_in_loss", "full-iteration graph"),
    (["cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [full_iteration]}",
      "ddp.check_for_nan_in_grad=true"], "ddp.check_for_nan_in_grad", "full-iteration graph"),
    (["cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [full_iteration, attn]}"],
     "cuda_graph.cuda_graph_scope", "full_iteration holds everything else"),
    (["cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [full_iteration]}",
      "mixed_precision=fp16_mixed"], "cuda_graph.cuda_graph_scope", "keep the loss scale"),
    (["cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [full_iteration]}",
      "rng.te_rng_tracker=true", "train.rampup_batch_size=[4, 4, 100]"],
     "cuda_graph.cuda_graph_impl", "rampup_batch_size"),
    (["cuda_graph={cuda_graph_impl: transformer_engine}", "rng.te_rng_tracker=true",
      "train.decrease_batch_size_if_needed=true"], "cuda_graph.cuda_graph_impl",
     "number of micro-batches"),
    (["mixed_precision=bf16_with_fp8_current_scaling_mixed", "model.ffn_hidden_size=88"],
     "model.ffn_hidden_size", "products in FP8 need a multiple of 16; use 96"),
    (["mixed_precision=bf16_with_mxfp8_mixed", "model.hidden_size=80", "model.kv_channels=32"],
     "model.hidden_size", "products in FP8 need a multiple of 32; use 96"),
    (["mixed_precision=bf16_with_mxfp8_mixed", "model.seq_length=48"], "model.seq_length",
     "rank's micro-batch has 48 tokens, products in FP8 need a multiple of 32"),
    (["mixed_precision=bf16_with_nvfp4_mixed", TP2, "model.ffn_hidden_size=96"],
     "model.ffn_hidden_size", "FP4 need a multiple of 32 x TP = 64; use 128"),
    ([MOE, "cuda_graph.cuda_graph_impl=local", "rng.te_rng_tracker=true",
      "comm_overlap.overlap_moe_expert_parallel_comm=true"], "cuda_graph.cuda_graph_impl",
     "graphs of Transformer Engine"),
    (["cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [attn]}",
      "recompute={recompute_granularity: full, recompute_method: block, recompute_num_layers: 1}"],
     "cuda_graph.cuda_graph_scope", "goes with full_iteration alone"),
    ([MOE, "cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [moe, moe_router]}"],
     "cuda_graph.cuda_graph_scope", "moe excludes moe_router"),
    ([MOE, "cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [moe_preprocess]}"],
     "cuda_graph.cuda_graph_scope", "needs moe_router"),
    (["cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [moe_router]}"],
     "cuda_graph.cuda_graph_scope", "need experts"),
    (["cuda_graph.cuda_graph_impl=local", "rng.te_rng_tracker=true",
      "offload={cpu_offloading: true, cpu_offloading_num_layers: 1}"], "cuda_graph.cuda_graph_impl",
     "excludes activation offloading"),
    (["comm_overlap.tp_comm_overlap=true"], "comm_overlap.tp_comm_overlap",
     "needs tensor parallelism, sequence parallelism, which this run does not have"),
    (["comm_overlap.tp_comm_overlap=true", TP2, SP, "model.layer_spec=torch", "dist.device=cpu"],
     "comm_overlap.tp_comm_overlap", "needs Transformer Engine layers, CUDA"),
    (["comm_overlap.tp_comm_overlap=true", TP2, SP, "comm_overlap.tp_comm_overlap_cfg={fc3: {}}"],
     "comm_overlap.tp_comm_overlap_cfg", "fc3: no such GEMM; use fc1_dgrad"),
    (["comm_overlap.tp_comm_overlap_cfg={qkv_fprop: {num_sm: 4}}"],
     "comm_overlap.tp_comm_overlap_cfg", "no effect without tp_comm_overlap"),
    (["comm_overlap.wgrad_deferral_limit=2"], "comm_overlap.wgrad_deferral_limit", "no effect"),
    ([MOE, "comm_overlap.overlap_moe_expert_parallel_comm=true", PP2],
     "comm_overlap.overlap_moe_expert_parallel_comm", "needs (EP > 1|virtual stages)"),
    ([MOE, "model.expert_model_parallel_size=2", "model.moe_token_dispatcher_type=alltoall",
      "mixed_precision=bf16_mixed", "comm_overlap.overlap_moe_expert_parallel_comm=true",
      "recompute={recompute_granularity: selective, recompute_modules: [moe]}"],
     "comm_overlap.overlap_moe_expert_parallel_comm", "excludes full recomputation and that of moe"),
    (["comm_overlap.defer_embedding_wgrad_compute=true"],
     "comm_overlap.defer_embedding_wgrad_compute", "gradient_accumulation_fusion"),
    (["comm_overlap.delay_wgrad_compute=true"], "comm_overlap.delay_wgrad_compute", "needs overlap"),
    (["comm_overlap.delay_wgrad_compute=true", "model.layer_spec=torch",
      "comm_overlap.overlap_moe_expert_parallel_comm=true"], "comm_overlap.delay_wgrad_compute",
     "compute weight gradients apart"),
    # checkpoints
    (["checkpoint.save_interval=5"], "checkpoint.save_interval", "no effect without save"),
    (["checkpoint.most_recent_k=0"], "checkpoint.most_recent_k", "delete every checkpoint"),
    (["checkpoint.save=a", "checkpoint.save_interval=4", "checkpoint.save_retain_interval=6",
      "checkpoint.most_recent_k=2"], "checkpoint.save_retain_interval", "multiple of save_interval=4"),
    (["checkpoint.save=a", "checkpoint.save_interval=4", "checkpoint.save_retain_interval=8"],
     "checkpoint.save_retain_interval", "keeps every checkpoint"),
    (["checkpoint.ckpt_step=5"], "checkpoint.ckpt_step", "no effect without load"),
    (["checkpoint.exit_on_missing_checkpoint=true"], "checkpoint.exit_on_missing_checkpoint", "load"),
    (["checkpoint.finetune=true"], "checkpoint.finetune", "pretrained_checkpoint or checkpoint.load"),
    (["peft.rank=4"], "checkpoint.pretrained_checkpoint", "peft needs a model to adapt"),
    # processes
    (["dist.device=cpu", "dist.distributed_backend=nccl"], "dist.distributed_backend", "use gloo"),
    (["dist.device=cpu", "dist.high_priority_stream_groups=[dp]"],
     "dist.high_priority_stream_groups", "for NCCL"),
    (["dist.device=cpu", "model.apply_rope_fusion=true"], "model.apply_rope_fusion", "CUDA kernels"),
    (["dist.device=cpu", "model.layer_spec=te"], "model.layer_spec", "needs CUDA"),
    (["profiling.profile_step_end=5"], "profiling.profile_step_end", "above profile_step_start=10"),
    (["profiling.use_pytorch_profiler=true", "profiling.profile_ranks=[4]"],
     "profiling.profile_ranks", "rank 4 does not exist among 4"),
    (["profiling.use_pytorch_profiler=true", "profiling.profile_step_start=100",
      "profiling.profile_step_end=101"], "profiling.profile_step_start", "after the last step, 100"),
    (["env_vars={'A=B': 1}"], "env_vars.A=B", "no name of an environment variable"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "field", "says"), BROKEN, ids=lambda v: str(v)[:60])
def test_a_broken_rule_names_its_field_and_says_what_to_do(small, overrides, field, says):
    if field is None and not says:
        small.override(*overrides).finalize(4)
        return
    with pytest.raises(ConfigError, match=says) as caught:
        small.override(*overrides).finalize(4)
    if field is not None:
        mine = [v for v in caught.value.violations if v.field == field]
        assert mine, [str(v) for v in caught.value.violations]
        assert re.search(says, f"{mine[0].rule}; {mine[0].remedy}"), str(mine[0])
        assert all(v.remedy and v.rule for v in caught.value.violations)


VALID = [
    [TP2, SP],
    [PP2],
    [PP2, VPP2],
    [PP2, VPP2, "comm_overlap.overlap_p2p_comm=true", "comm_overlap.batch_p2p_comm=false"],
    [CP2, "model.cp_comm_type=all_gather"],
    [CP2, WINDOW, "model.window_attn_skip_freq=[0, 1, 0, 1]"],
    ["model.attn_logit_softcapping=50.0", "model.final_logit_softcapping=30.0"],
    [CP2, "model.cp_comm_type=[p2p, p2p, a2a, a2a]"],
    [TP2, "model.num_query_groups=1"],
    [MOE, "model.expert_model_parallel_size=2", "model.moe_token_dispatcher_type=alltoall"],
    [MOE, TP2, SP, "model.expert_model_parallel_size=2", "model.expert_tensor_parallel_size=1"],
    ["mixed_precision=bf16-mixed"],
    ["mixed_precision=fp16_mixed", "optimizer.use_distributed_optimizer=true",
     "ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true"],
    ["mixed_precision=bf16_with_fp8_current_scaling_mixed"],
    ["train.train_iters=null", "train.train_samples=1000", "train.rampup_batch_size=[4, 4, 100]"],
    ["train.train_iters=null", "train.train_tokens=1e5"],
    ["train.train_iters=null", "train.num_epochs=1.5"],
    ["train.global_batch_size=18", "train.decrease_batch_size_if_needed=true"],
    ["model.num_layers=5", PP2, "model.num_layers_in_first_pipeline_stage=2"],
    ["model.num_layers=5", PP2, "model.account_for_embedding_in_pipeline_split=true"],
    ["recompute={recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}"],
    ["recompute.recompute_granularity=selective", "recompute.recompute_modules=[mlp, layernorm]"],
    ["peft.rank=4", "checkpoint.pretrained_checkpoint=somewhere"],
    ["scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=20"],
    ["cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [full_iteration]}",
     "train.check_for_nan_in_loss=false", "rng.te_rng_tracker=true"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", VALID, ids=lambda v: " ".join(v)[:70])
def test_what_megatron_can_run_is_accepted(small, overrides):
    resolved = small.override(*overrides).finalize(4)
    assert resolved.finalize(4) == resolved


def test_all_violations_come_at_once(violations):
    found = violations("optimizer.min_lr=1.0", "train.global_batch_size=3", "dataset.split=x")
    assert set(found) == {"optimizer.min_lr", "train.global_batch_size", "dataset.split"}


def test_one_violation_is_one_line(small):
    with pytest.raises(ConfigError) as caught:
        small.override("optimizer.min_lr=1.0").finalize(4)
    assert str(caught.value) == (
        "optimizer.min_lr=1.0: must be at most optimizer.lr=0.0003; lower it, or raise optimizer.lr"
    )


def test_several_violations_are_listed_in_the_order_of_the_fields(small):
    broken = small.override(
        "optimizer.min_lr=1.0", "model.num_layers=0", "train.global_batch_size=3"
    )
    with pytest.raises(ConfigError, match="3 problems in the configuration") as caught:
        broken.finalize(4)
    assert [v.field for v in caught.value.violations] == [
        "model.num_layers", "train.global_batch_size", "optimizer.min_lr",
    ]  # fmt: skip


def test_defaults_say_everything_that_is_required():
    with pytest.raises(ConfigError) as caught:
        ConfigContainer().finalize(1)
    assert {v.field for v in caught.value.violations} == {
        "model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.seq_length",
        "train.train_iters",
    }  # fmt: skip


@pytest.mark.parametrize("world_size", [0, -1, 1.5, "4", True])
def test_a_world_size_is_a_positive_int(small, world_size):
    with pytest.raises(ConfigError, match=r"world_size=.*must be an int of at least 1"):
        small.finalize(world_size)
