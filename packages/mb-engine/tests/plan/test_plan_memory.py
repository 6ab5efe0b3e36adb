# SPDX-License-Identifier: Apache-2.0
"""Planned parameters, gradients and optimizer state are, to the byte, those of built engines.

The oracle counts what exists after one step: elements of the model's parameters, of the gradient
buffers of data parallelism, and of the tensors that the optimizer keeps.
"""

from __future__ import annotations

import pytest
import torch
from mb_engine import Engine
from mb_engine.plan.layout import Degrees
from mb_engine.plan.memory import stage_state, state_memory
from mb_engine.testing import run_ranks, tiny_config

BASE = ["model.num_layers=2", "train.micro_batch_size=1", "train.global_batch_size=8"]
DISTRIBUTED = ["optimizer.use_distributed_optimizer=true"]
BF16 = ["mixed_precision=bf16_mixed"]
TIED = ["model.share_embeddings_and_output_weights=true"]
TP2 = ["model.tensor_model_parallel_size=2"]
PP2 = ["model.pipeline_model_parallel_size=2"]
MOE = [
    "model.num_moe_experts=4",
    "model.moe_shared_expert_intermediate_size=64",
    "model.moe_token_dispatcher_type=alltoall",
]
GPT2 = [
    "model.normalization=LayerNorm",
    "model.add_bias_linear=true",
    "model.gated_linear_unit=false",
    "model.activation_func=gelu",
    "model.position_embedding_type=learned_absolute",
    "model.num_query_groups=4",
]
ODD = ["model.hidden_size=36", "model.ffn_hidden_size=52", "model.kv_channels=10"]

CASES = {
    "GQA, gated": (1, []),
    "dense, GPT-2": (1, GPT2),
    "tied, bf16": (1, TIED + BF16),
    "query and key norms, qkv bias": (1, ["model.qk_layernorm=true", "model.add_qkv_bias=true"]),
    "SGD": (1, ["optimizer.optimizer=sgd"]),
    "SGD without momentum": (1, ["optimizer.optimizer=sgd", "optimizer.sgd_momentum=0.0"]),
    "odd sizes, distributed": (1, ODD + DISTRIBUTED + BF16),
    "bf16 gradients": (1, [*BF16, "ddp.grad_reduce_in_fp32=false",
                           "mixed_precision.grad_reduce_in_fp32=false"]),
    "TP2": (2, TP2),
    "TP2, GPT-2, bf16": (2, TP2 + GPT2 + BF16),
    "TP2, more ranks than groups": (2, [*TP2, "model.num_query_groups=1"]),
    "PP2, tied": (2, PP2 + TIED),
    "PP2, tied, bf16, distributed": (2, PP2 + TIED + BF16 + DISTRIBUTED),
    "PP2, uneven": (2, [*PP2, "model.num_layers=3", "model.num_layers_in_first_pipeline_stage=1"]),
    "PP2, VPP2": (2, [*PP2, "model.num_layers=4", "model.virtual_pipeline_model_parallel_size=2"]),
    "PP2, layout": (
        2, [*PP2, "model.num_layers=3", "model.pipeline_model_parallel_layout=Et|ttL"],
    ),
    "PP2, loss counted as a layer": (
        2, [*PP2, "model.num_layers=3", "model.account_for_loss_in_pipeline_split=true"],
    ),
    "DP2": (2, []),
    "DP2, distributed": (2, DISTRIBUTED),
    "DP2, distributed, bf16, odd sizes": (2, DISTRIBUTED + BF16 + ODD),
    "DP2, distributed, small buckets": (
        2, [*DISTRIBUTED, "ddp.overlap_grad_reduce=true", "ddp.bucket_size=4096"],
    ),
    "CP2, distributed": (2, [*DISTRIBUTED, "model.context_parallel_size=2"]),
    "MoE": (1, MOE),
    "MoE in every second layer, bf16": (1, [*MOE, *BF16, "model.moe_layer_freq=[0,1]"]),
    "EP2": (2, [*MOE, "model.expert_model_parallel_size=2"]),
    "EP2, distributed, bf16": (
        2, [*MOE, *DISTRIBUTED, *BF16, "model.expert_model_parallel_size=2"],
    ),
    "EP2 x DP2, distributed": (4, [*MOE, *DISTRIBUTED, "model.expert_model_parallel_size=2"]),
    "TP2 x EP2, one rank an expert": (
        4,
        [*MOE, *DISTRIBUTED, *TP2, "model.sequence_parallel=true",
         "model.expert_model_parallel_size=2", "model.expert_tensor_parallel_size=1"],
    ),
    "TP2 x PP2": (4, TP2 + PP2),
    "TP2 x DP2, distributed, bf16, tied": (4, TP2 + DISTRIBUTED + BF16 + TIED),
    "PP2 x DP2, ranks along the pipeline": (
        4, [*PP2, *DISTRIBUTED, *TIED, "dist.use_tp_pp_dp_mapping=true"],
    ),
}  # fmt: skip


def optimizer_tensors(optimizer):
    """Return what the optimizer keeps beside the model's own parameters, without step counters."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(one, "is_stub_optimizer", False):
            continue
        for parameter, state in one.optimizer.state.items():
            yield from ((v, None) for k, v in state.items() if torch.is_tensor(v) and k != "step")
            yield parameter, "parameter"


def count(overrides):
    """Return bytes of parameters, gradient buffers and optimizer state of this rank's engine."""
    engine = Engine.from_config(tiny_config(*BASE, *overrides))
    engine.optimizer.step()  # of gradients that are zero; it makes the states
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    homes = {p.untyped_storage().data_ptr() for p in parameters}
    held = 0
    for tensor, kind in optimizer_tensors(engine.optimizer):
        # A float32 parameter that the optimizer updates in place is the model's.
        if kind is None or tensor.untyped_storage().data_ptr() not in homes:
            held += tensor.numel() * tensor.element_size()
    buffers = [b for c in engine.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
    used = sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters)
    padded = sum(
        b.param_data.numel() * b.param_data.element_size()
        for b in buffers
        if b.param_data is not None
    )
    own = sum(p.numel() * p.element_size() for p in parameters)
    layout = engine.layout
    engine.close()
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": own,
        "gradient_bytes": used,
        "optimizer_bytes": held,
        "padding_bytes": gradients - used + (padded - own if padded else 0),
        "place": (layout.tp_rank, layout.cp_rank, layout.dp_rank, layout.pp_rank, layout.ep_rank),
    }


def count_all(cases):
    """Count for each of *cases*, one after the other in the same processes."""
    return [count(overrides) for overrides in cases]


@pytest.fixture(scope="module")
def counted():
    found = {}
    for ranks in sorted({n for n, _ in CASES.values()}):
        names = [name for name, (n, _) in CASES.items() if n == ranks]
        by_rank = run_ranks(count_all, ranks, [CASES[n][1] for n in names], timeout_s=240.0)
        for index, name in enumerate(names):
            found[name] = [rank[index] for rank in by_rank]
    return found


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_every_rank_are_those_of_the_built_engine(counted, name):
    ranks, overrides = CASES[name]
    config = tiny_config(*BASE, *overrides).finalize(ranks)
    degrees = Degrees.from_config(config)
    for rank in range(ranks):
        place = degrees.place(rank)
        state = stage_state(config, degrees, pp_rank=place.pp_rank, spec="torch")
        planned = state_memory(config, state, state.parts(place))
        expected = dict(counted[name][rank])
        at = (place.tp_rank, place.cp_rank, place.dp_rank, place.pp_rank, place.ep_rank)
        assert at == expected.pop("place")
        assert {key: getattr(planned, key) for key in expected} == expected


def test_what_replicas_own_adds_up_to_the_buffer():
    config = tiny_config(*BASE, *DISTRIBUTED, *ODD).finalize(8)
    degrees = Degrees.from_config(config)
    state = stage_state(config, degrees, pp_rank=0, spec="te")
    for buffer in state.dense:
        owned = sum(buffer.owned(i, state.dense_replicas) for i in range(8))
        assert owned == buffer.used
