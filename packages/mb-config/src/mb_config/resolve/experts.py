# SPDX-License-Identifier: Apache-2.0
"""Rules of mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mb_config.resolve.draft import Draft

_ONLY_WITH_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_z_loss_coeff",
    "moe_shared_expert_intermediate_size",
    "moe_expert_capacity_factor",
    "moe_router_dtype",
)


def resolve(draft: Draft) -> None:
    """Derive the experts' width and check routing and dispatch."""
    model = draft.config.model
    if model.num_moe_experts is None:
        for name in _ONLY_WITH_EXPERTS:
            draft.require(
                getattr(model, name) is None,
                f"model.{name}",
                "needs experts",
                "set model.num_moe_experts, or leave it out",
            )
        for name in ("moe_grouped_gemm", "moe_permute_fusion", "moe_shared_expert_overlap"):
            draft.require(
                not getattr(model, name),
                f"model.{name}",
                "needs experts",
                "set model.num_moe_experts, or leave it out",
            )
        return
    if model.ffn_hidden_size is not None:
        draft.fill("model.moe_ffn_hidden_size", model.ffn_hidden_size, "ffn_hidden_size")
    _widths(draft)
    _routing(draft)
    _dispatch(draft)


def _widths(draft: Draft) -> None:
    model = draft.config.model
    etp, tp = model.expert_tensor_parallel_size or 1, model.tensor_model_parallel_size
    width = model.moe_ffn_hidden_size or 0
    draft.require(
        width % etp == 0,
        "model.moe_ffn_hidden_size",
        f"must be a multiple of expert_tensor_parallel_size={etp}",
        "change one of them",
    )
    shared = model.moe_shared_expert_intermediate_size or 0
    draft.require(
        shared % tp == 0,
        "model.moe_shared_expert_intermediate_size",
        f"must be a multiple of tensor_model_parallel_size={tp}",
        "change one of them",
    )
    draft.require(
        not model.add_bias_linear or etp == 1,
        "model.add_bias_linear",
        f"experts with a bias cannot be split, here expert_tensor_parallel_size={etp}",
        "set model.expert_tensor_parallel_size=1, or model.add_bias_linear=false",
    )
    freq = model.moe_layer_freq
    valid = (
        len(freq) == model.num_layers and set(freq) <= {0, 1}
        if isinstance(freq, list)
        else (freq >= 1)
    )
    draft.require(
        valid,
        "model.moe_layer_freq",
        f"must be at least 1, or a list of {model.num_layers} zeros and ones, one a layer",
        "correct it",
    )


def _routing(draft: Draft) -> None:
    model = draft.config.model
    experts, kind = model.num_moe_experts or 0, model.moe_router_load_balancing_type
    draft.require(
        model.moe_router_topk <= experts,
        "model.moe_router_topk",
        f"must be at most num_moe_experts={experts}",
        f"choose at most {experts}",
    )
    draft.require(
        model.moe_router_topk > 1
        or model.moe_router_score_function != "softmax"
        or model.moe_router_pre_softmax
        or kind == "sinkhorn",
        "model.moe_router_topk",
        "a softmax over the one chosen expert has no gradient",
        "set model.moe_router_pre_softmax=true",
    )
    draft.require(
        model.moe_aux_loss_coeff == 0 or kind.endswith("aux_loss"),
        "model.moe_aux_loss_coeff",
        f"has no effect with moe_router_load_balancing_type={kind}",
        "set it to 0, or choose aux_loss",
    )
    draft.require(
        model.moe_expert_capacity_factor is None or kind != "sinkhorn",
        "model.moe_expert_capacity_factor",
        "does not go with sinkhorn",
        "choose aux_loss or none",
    )


def _dispatch(draft: Draft) -> None:
    model = draft.config.model
    draft.require(
        not model.moe_shared_expert_overlap
        or (
            model.moe_token_dispatcher_type == "alltoall"  # noqa: S105
            and model.moe_shared_expert_intermediate_size is not None
        ),
        "model.moe_shared_expert_overlap",
        "needs a shared expert and moe_token_dispatcher_type=alltoall",
        "set both, or leave it out",
    )
    overlap = draft.config.comm_overlap
    if overlap.overlap_moe_expert_parallel_comm:
        draft.require(
            model.moe_token_dispatcher_type in ("alltoall", "flex")
            and (model.bf16 or model.fp16)
            and model.expert_model_parallel_size > 1
            and not model.moe_shared_expert_overlap
            and draft.config.recompute.recompute_granularity != "full",
            "comm_overlap.overlap_moe_expert_parallel_comm",
            "needs EP > 1, the alltoall or flex dispatcher, bf16 or fp16, no shared-expert overlap"
            " and no full recomputation",
            "change these, or leave it out",
        )
