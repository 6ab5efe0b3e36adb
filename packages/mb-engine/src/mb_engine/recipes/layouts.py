# SPDX-License-Identifier: Apache-2.0
"""Layouts by model and number of H100s, which leave some memory as the planner counts it.

Each is the fastest such one of ``mb-train plan --search --gpu h100-80gb`` for pretraining, in
short: degrees of parallelism, micro-batch size (MBS), whether the optimizer is sharded over
data-parallel ranks, and what is recomputed.
"""

from __future__ import annotations

_FIELDS = {
    "TP": "model.tensor_model_parallel_size",
    "PP": "model.pipeline_model_parallel_size",
    "VPP": "model.virtual_pipeline_model_parallel_size",
    "CP": "model.context_parallel_size",
    "EP": "model.expert_model_parallel_size",
    "ETP": "model.expert_tensor_parallel_size",
    "MBS": "train.micro_batch_size",
}
_SHARDED = (
    "ddp.use_distributed_optimizer=true",
    "ddp.overlap_grad_reduce=true",
    "ddp.overlap_param_gather=true",
)
_FULL = (
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
)


def overrides(layout: str) -> list[str]:
    """Return the overrides of a configuration that *layout* stands for; TP has sequences split."""
    made: list[str] = []
    for word in layout.split():
        if word == "sharded":
            made += _SHARDED
        elif word == "recompute:full":
            made += _FULL
        elif word.startswith("recompute:"):
            modules = word.removeprefix("recompute:")
            made += ["recompute.recompute_granularity=selective"]
            made += [f"recompute.recompute_modules=[{modules}]"]
        else:
            name = word.rstrip("0123456789")
            made.append(f"{_FIELDS[name]}={word.removeprefix(name)}")
            made += ["model.sequence_parallel=true"] if name == "TP" else []
    return made


LAYOUTS: dict[str, dict[int, str]] = {
    "llama3_2_1b": {
        1: "MBS4",
        8: "MBS4 sharded",
        64: "MBS4 sharded",
    },
    "llama3_2_3b": {
        1: "MBS4 recompute:full",
        8: "MBS2 sharded",
        64: "MBS2 sharded",
    },
    "llama3_1_8b": {
        8: "PP2 VPP4 MBS1 sharded",
        64: "CP2 MBS1 sharded",
    },
    "llama3_1_70b": {
        32: "TP4 PP4 CP2 MBS1 sharded",
        64: "TP4 PP8 VPP5 MBS1 sharded",
    },
    "llama3_1_405b": {
        576: "TP8 PP9 CP2 MBS1 sharded",
        1152: "TP8 PP9 CP2 MBS1 sharded",
    },
    "qwen2_5_0_5b": {
        1: "MBS4",
        8: "MBS4 sharded",
        64: "MBS4 sharded",
    },
    "qwen2_5_1_5b": {
        1: "MBS2",
        8: "MBS2 sharded",
        64: "MBS2 sharded",
    },
    "qwen2_5_3b": {
        1: "MBS2 recompute:mlp",
        8: "MBS2 sharded",
        64: "MBS2 sharded",
    },
    "qwen2_5_7b": {
        8: "TP2 MBS2 sharded",
        64: "TP2 MBS2 sharded",
    },
    "qwen2_5_14b": {
        8: "TP2 PP2 VPP6 MBS1 sharded",
        64: "TP2 MBS1 sharded",
    },
    "qwen2_5_32b": {
        8: "TP4 PP2 VPP2 MBS1 recompute:full",
        64: "TP2 PP4 VPP4 CP2 MBS1 sharded",
    },
    "qwen2_5_72b": {
        32: "TP8 PP2 MBS1 sharded",
        64: "TP4 PP4 VPP5 CP2 MBS1 sharded",
    },
    "qwen3_0_6b": {
        1: "MBS4",
        8: "MBS4 sharded",
        64: "MBS4 sharded",
    },
    "qwen3_1_7b": {
        1: "MBS2",
        8: "MBS4 sharded",
        64: "MBS4 sharded",
    },
    "qwen3_4b": {
        1: "MBS1 recompute:full",
        8: "MBS1 sharded",
        64: "MBS1 sharded",
    },
    "qwen3_8b": {
        8: "PP2 VPP6 MBS1 sharded",
        64: "CP2 MBS1 sharded",
    },
    "qwen3_14b": {
        8: "TP2 PP2 VPP5 MBS1 sharded",
        64: "TP2 MBS1 sharded",
    },
    "qwen3_32b": {
        8: "TP4 PP2 MBS1 recompute:full",
        64: "TP2 PP4 VPP4 CP2 MBS1 sharded",
    },
    "qwen3_30b_a3b": {
        8: "TP4 PP2 VPP2 EP4 ETP1 MBS4 recompute:full",
        64: "EP8 ETP1 MBS2 sharded recompute:moe",
    },
    "qwen3_235b_a22b": {
        64: "TP4 PP2 EP32 ETP1 MBS1 sharded recompute:full",
        128: "TP4 CP2 EP128 ETP1 MBS1 sharded",
        256: "TP4 EP128 ETP1 MBS1 sharded",
    },
    "mistral_7b": {
        8: "PP2 VPP4 MBS1 sharded",
        64: "MBS1 sharded",
    },
    "mixtral_8x7b": {
        16: "TP2 PP2 VPP4 CP2 EP8 ETP1 MBS1 sharded",
        64: "PP4 VPP4 CP2 EP8 ETP1 MBS1 sharded",
    },
    "gemma2_2b": {
        1: "MBS1",
        8: "MBS2 sharded",
        64: "MBS2 sharded",
    },
    "gemma2_9b": {
        8: "TP2 MBS1 sharded",
        64: "TP2 MBS1 sharded",
    },
    "gemma2_27b": {
        8: "TP8 MBS1",
        64: "TP4 MBS1 sharded",
    },
    "gemma3_1b": {
        1: "MBS2",
        8: "MBS4 sharded",
        64: "MBS4 sharded",
    },
    "gemma3_4b": {
        8: "MBS1 sharded",
        64: "MBS1 sharded",
    },
    "gemma3_12b": {
        8: "TP2 CP2 MBS1 sharded",
        64: "TP2 MBS1 sharded",
    },
    "gemma3_27b": {
        8: "TP8 MBS1",
        64: "TP2 PP2 CP2 MBS1 sharded",
    },
}
