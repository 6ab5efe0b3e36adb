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
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_input_jitter_eps",
)
_SWITCHES = (
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_enable_expert_bias",
    "moe_router_fusion",
    "moe_shared_expert_overlap",
    "moe_shared_expert_gate",
    "moe_pad_expert_input_to_capacity",
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
        for name in _SWITCHES:
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
    draft.require(
        etp == tp or model.expert_model_parallel_size > 1,
        "model.expert_tensor_parallel_size",
        f"other than tensor_model_parallel_size={tp} gives wrong gradients without expert"
        " parallelism: megatron-core then adds up experts as it does dense layers",
        "leave it out, or raise model.expert_model_parallel_size",
    )
    shared = model.moe_shared_expert_intermediate_size or 0
    draft.require(
        shared % tp == 0,
        "model.moe_shared_expert_intermediate_size",
        f"must be a multiple of tensor_model_parallel_size={tp}",
        "change one of them",
    )
    draft.require(
        not (shared and model.add_bias_linear),
        "model.moe_shared_expert_intermediate_size",
        "a shared expert has no bias",
        "set model.add_bias_linear=false, or leave it out",
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
        not model.moe_router_enable_expert_bias or model.moe_router_score_function == "sigmoid",
        "model.moe_router_enable_expert_bias",
        "needs moe_router_score_function=sigmoid",
        "set model.moe_router_score_function=sigmoid, or leave it out",
    )
    _groups(draft)
    _capacity(draft)


def _groups(draft: Draft) -> None:
    model = draft.config.model
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    if groups is None and chosen is None:
        return
    if not draft.require(
        groups is not None and chosen is not None,
        "model.moe_router_num_groups",
        "goes with moe_router_group_topk",
        "set both, or leave both out",
    ):
        return
    assert groups is not None
    assert chosen is not None
    experts, topk = model.num_moe_experts or 0, model.moe_router_topk
    draft.require(
        experts % groups == 0,
        "model.moe_router_num_groups",
        f"must divide num_moe_experts={experts}",
        "choose a divisor",
    )
    draft.require(
        chosen <= groups and topk % chosen == 0 and topk <= chosen * (experts // groups),
        "model.moe_router_group_topk",
        f"must be at most moe_router_num_groups={groups}, divide moe_router_topk={topk}, and its"
        f" groups must hold that many experts",
        "choose another number of groups",
    )


def _capacity(draft: Draft) -> None:
    model = draft.config.model
    draft.require(
        model.moe_expert_capacity_factor is None
        or model.moe_router_load_balancing_type != "sinkhorn",
        "model.moe_expert_capacity_factor",
        "does not go with sinkhorn",
        "choose aux_loss or none",
    )
    draft.require(
        not model.moe_pad_expert_input_to_capacity or model.moe_expert_capacity_factor is not None,
        "model.moe_pad_expert_input_to_capacity",
        "needs a capacity",
        "set model.moe_expert_capacity_factor, or leave it out",
    )
    draft.require(
        model.moe_expert_capacity_factor is None
        or model.moe_token_drop_policy == "probs"  # noqa: S105 - no password
        or model.context_parallel_size == 1,
        "model.moe_token_drop_policy",
        "the first tokens of a sequence are not known where context parallel ranks share it",
        "set model.moe_token_drop_policy=probs",
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
    draft.require(
        not model.moe_shared_expert_gate or model.moe_shared_expert_intermediate_size is not None,
        "model.moe_shared_expert_gate",
        "needs a shared expert",
        "set model.moe_shared_expert_intermediate_size, or leave it out",
    )
    flex = model.moe_token_dispatcher_type == "flex"  # noqa: S105 - no password
    ranks = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or 1)
    draft.require(
        not flex or ranks > 1,
        "model.moe_token_dispatcher_type",
        "flex sends tokens between ranks, here expert TP x EP = 1",
        "use alltoall, or raise model.expert_model_parallel_size",
    )
    draft.require(
        not (
            flex
            and model.moe_flex_dispatcher_backend == "deepep"
            and model.moe_pad_expert_input_to_capacity
        ),
        "model.moe_pad_expert_input_to_capacity",
        "DeepEP does not pad",
        "set it to false, or use alltoall",
    )
