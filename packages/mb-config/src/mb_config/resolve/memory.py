# SPDX-License-Identifier: Apache-2.0
"""Recomputation, offloading and CUDA graphs: what goes together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_config.resolve.draft import Draft


def resolve(draft: Draft) -> None:
    """Check the ways to trade time for memory, and CUDA-only features."""
    _recompute(draft)
    _offload_activations(draft)
    _offload_optimizer(draft)
    _compile(draft)
    if draft.config.cuda_graph.cuda_graph_impl != "none":
        _cuda_graph(draft)
    else:
        draft.require(
            draft.config.cuda_graph.cuda_graph_scope is None,
            "cuda_graph.cuda_graph_scope",
            "has no effect with cuda_graph_impl=none",
            "set cuda_graph.cuda_graph_impl",
        )


def _recompute(draft: Draft) -> None:
    recompute = draft.config.recompute
    kind, at = recompute.recompute_granularity, "recompute"
    only_full = ("recompute_method", "recompute_num_layers")
    if kind == "full":
        for name in only_full:
            draft.require(
                getattr(recompute, name) is not None,
                f"{at}.{name}",
                "recompute_granularity=full needs it",
                f"give {at}.{name}",
            )
    else:
        for name in only_full:
            draft.require(
                getattr(recompute, name) is None,
                f"{at}.{name}",
                f"has no effect with recompute_granularity={kind or 'null'}",
                f"leave it out, or set {at}.recompute_granularity=full",
            )
        draft.require(
            not recompute.distribute_saved_activations,
            f"{at}.distribute_saved_activations",
            "needs recompute_granularity=full",
            f"set {at}.recompute_granularity=full",
        )
    draft.require(
        recompute.recompute_modules is None or kind == "selective",
        f"{at}.recompute_modules",
        f"has no effect with recompute_granularity={kind or 'null'}",
        f"leave it out, or set {at}.recompute_granularity=selective",
    )
    _recompute_layers(draft)
    _recompute_modules(draft)
    _recompute_in_fp8(draft)


def _recompute_layers(draft: Draft) -> None:
    recompute, model = draft.config.recompute, draft.config.model
    vpp = model.virtual_pipeline_model_parallel_size or 1
    most = max(1, model.num_layers // model.pipeline_model_parallel_size // vpp)
    uneven = model.num_layers_in_first_pipeline_stage or model.num_layers_in_last_pipeline_stage
    draft.require(
        uneven or recompute.recompute_num_layers is None or recompute.recompute_num_layers <= most,
        "recompute.recompute_num_layers",
        f"must be at most the {most} layers of a stage",
        f"use {most}",
    )
    draft.require(
        not recompute.distribute_saved_activations
        or (model.tensor_model_parallel_size > 1 and not model.sequence_parallel),
        "recompute.distribute_saved_activations",
        "needs tensor parallelism without sequence parallelism",
        "leave it out",
    )


def _recompute_modules(draft: Draft) -> None:
    recompute, model = draft.config.recompute, draft.config.model
    modules = recompute.recompute_modules or []
    for name in ("moe", "moe_act", "shared_experts"):
        draft.require(
            name not in modules or model.num_moe_experts is not None,
            "recompute.recompute_modules",
            f"{name} needs experts",
            f"leave {name} out, or set model.num_moe_experts",
        )
    draft.require(
        "moe_act" not in modules or model.moe_grouped_gemm,
        "recompute.recompute_modules",
        "moe_act needs moe_grouped_gemm",
        "set model.moe_grouped_gemm=true",
    )
    draft.require(
        "mla_up_proj" not in modules
        or getattr(model, "multi_latent_attention", False)
        or model.megatron.get("multi_latent_attention"),
        "recompute.recompute_modules",
        "mla_up_proj needs multi-latent attention",
        "leave mla_up_proj out",
    )
    draft.require(
        "shared_experts" not in modules or not model.moe_shared_expert_overlap,
        "recompute.recompute_modules",
        "shared_experts excludes moe_shared_expert_overlap",
        "set model.moe_shared_expert_overlap=false",
    )


def _recompute_in_fp8(draft: Draft) -> None:
    mixed = draft.config.mixed_precision
    modules = set(draft.config.recompute.recompute_modules or [])
    delayed = getattr(mixed, "fp8", None) and getattr(mixed, "fp8_recipe", None) == "delayed"
    draft.require(
        not delayed or not {"layernorm", "moe_act"} & modules,
        "recompute.recompute_modules",
        "layernorm and moe_act are not recomputed with delayed scaling, whose history would see"
        " each value twice",
        "leave them out, or use bf16_with_fp8_current_scaling_mixed",
    )


def _offload_activations(draft: Draft) -> None:
    offload, model = draft.config.offload, draft.config.model
    if not offload.cpu_offloading:
        draft.require(
            offload.cpu_offloading_num_layers == 0,
            "offload.cpu_offloading_num_layers",
            "has no effect without cpu_offloading",
            "set offload.cpu_offloading=true",
        )
        return
    at = "offload.cpu_offloading"
    draft.require(
        0 < offload.cpu_offloading_num_layers < max(1, model.num_layers),
        f"{at}_num_layers",
        f"must be between 1 and {model.num_layers - 1}, fewer than the model's layers",
        "choose such a number",
    )
    draft.require(
        model.pipeline_model_parallel_size == 1,
        at,
        "excludes pipeline parallelism",
        "set it to false, or model.pipeline_model_parallel_size=1",
    )
    draft.require(
        draft.config.recompute.recompute_granularity is None,
        at,
        "excludes recomputation",
        "set it to false, or recompute.recompute_granularity=null",
    )
    draft.require(
        model.layer_spec != "torch",
        at,
        "needs Transformer Engine layers",
        "set model.layer_spec=te, or offload.cpu_offloading=false",
    )
    draft.require(draft.config.dist.device != "cpu", at, "needs CUDA", "set it to false")


def _offload_optimizer(draft: Draft) -> None:
    offload, optimizer = draft.config.offload, draft.config.optimizer
    at = "offload.optimizer_cpu_offload"
    if not offload.optimizer_cpu_offload:
        for name in (
            "optimizer_offload_fraction",
            "use_torch_optimizer_for_cpu_offload",
            "overlap_cpu_optimizer_d2h_h2d",
        ):
            draft.require(
                not getattr(offload, name),
                f"offload.{name}",
                "has no effect without optimizer_cpu_offload",
                f"set {at}=true",
            )
        return
    draft.require(
        offload.optimizer_offload_fraction > 0,
        "offload.optimizer_offload_fraction",
        "must be above 0 with optimizer_cpu_offload",
        "set it to 1.0 to offload everything",
    )
    draft.require(
        optimizer.use_distributed_optimizer,
        at,
        "needs the distributed optimizer",
        "set optimizer.use_distributed_optimizer=true",
    )
    draft.require(
        optimizer.decoupled_weight_decay,
        at,
        "needs decoupled weight decay",
        "set optimizer.decoupled_weight_decay=true",
    )
    draft.require(
        draft.config.dist.device != "cpu", at, "is pointless and fails on CPU", "set it to false"
    )


def _whole_iteration(draft: Draft) -> None:
    """Refuse what changes between steps: a graph replays the numbers and shapes it was made of."""
    config = draft.config
    at = "cuda_graph.cuda_graph_scope"
    draft.require(
        config.cuda_graph.cuda_graph_scope == ["full_iteration"],
        at,
        "full_iteration holds everything else",
        f"set {at}=[full_iteration]",
    )
    draft.require(
        not config.model.fp16 or config.optimizer.loss_scale is not None,
        at,
        "full_iteration would keep the loss scale of the step it was captured in",
        "use bf16_mixed, or give optimizer.loss_scale",
    )
    draft.require(
        not config.train.check_for_nan_in_loss,
        "train.check_for_nan_in_loss",
        "cannot look at a loss inside a full-iteration graph",
        "set train.check_for_nan_in_loss=false",
    )
    draft.require(
        not config.ddp.check_for_nan_in_grad,
        "ddp.check_for_nan_in_grad",
        "cannot look at gradients inside a full-iteration graph",
        "set ddp.check_for_nan_in_grad=false",
    )


def _micro_batches(draft: Draft) -> None:
    train, impl = draft.config.train, "cuda_graph.cuda_graph_impl"
    draft.require(
        train.rampup_batch_size is None,
        impl,
        "keeps the number of micro-batches it captured, which rampup_batch_size changes",
        "leave train.rampup_batch_size out",
    )
    draft.require(
        not train.decrease_batch_size_if_needed,
        impl,
        "keeps the number of micro-batches it captured",
        "set train.decrease_batch_size_if_needed=false",
    )


def _compile(draft: Draft) -> None:
    model = draft.config.model
    if not model.torch_compile:
        return
    draft.require(
        model.layer_spec != "te",
        "model.torch_compile",
        "has nothing to compile in Transformer Engine's layers, which are kernels already",
        "leave it out, or set model.layer_spec=torch",
    )
    draft.require(
        draft.config.dist.device != "cpu",
        "model.torch_compile",
        "needs CUDA: on a CPU starting a compiler costs more than it wins",
        "leave it out",
    )


def _cuda_graph(draft: Draft) -> None:
    graph, config = draft.config.cuda_graph, draft.config
    scope, at = graph.cuda_graph_scope or [], "cuda_graph.cuda_graph_scope"
    impl = "cuda_graph.cuda_graph_impl"
    draft.require(config.dist.device != "cpu", impl, "needs CUDA", "set it to none")
    draft.require(
        not config.offload.cpu_offloading,
        impl,
        "excludes activation offloading",
        "set offload.cpu_offloading=false",
    )
    draft.require(
        config.rng.te_rng_tracker,
        impl,
        "needs the random states of Transformer Engine",
        "set rng.te_rng_tracker=true",
    )
    full = "full_iteration" in scope
    draft.require(
        not full or graph.cuda_graph_impl == "local",
        at,
        "full_iteration needs the local capture",
        f"set {impl}=local",
    )
    if full:
        _whole_iteration(draft)
    if full or graph.cuda_graph_impl == "transformer_engine":
        _micro_batches(draft)
    draft.require(
        not config.comm_overlap.overlap_moe_expert_parallel_comm
        or (graph.cuda_graph_impl == "transformer_engine" and not {"moe", "mlp"} & set(scope)),
        impl,
        "overlap_moe_expert_parallel_comm goes with graphs of Transformer Engine without moe, mlp",
        f"set {impl}=none",
    )
    draft.require(
        config.recompute.recompute_granularity != "full" or scope == ["full_iteration"],
        at,
        "full recomputation goes with full_iteration alone",
        f"set {at}=[full_iteration], or recompute selectively",
    )
    _graphs_of_experts(draft, scope)


def _graphs_of_experts(draft: Draft, scope: Sequence[str]) -> None:
    at = "cuda_graph.cuda_graph_scope"
    draft.require(
        not ("moe" in scope and "moe_router" in scope),
        at,
        "moe excludes moe_router",
        "drop one",
    )
    draft.require(
        "moe_preprocess" not in scope or "moe_router" in scope,
        at,
        "moe_preprocess needs moe_router",
        "add moe_router",
    )
    draft.require(
        draft.config.model.num_moe_experts is not None or not {"moe", "moe_router"} & set(scope),
        at,
        "moe and moe_router need experts",
        "leave them out",
    )
