# SPDX-License-Identifier: Apache-2.0
"""Planned bytes of parameters, gradients and optimizer state are exact for every row of the table.

The oracle counts what an engine holds after the optimizer's first step, on every rank. Rows that
differ in nothing but how they compute share one engine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from mb_engine import Engine
from mb_engine.plan.layout import Degrees
from mb_engine.plan.memory import stage_state, state_memory
from mb_engine.testing import run_ranks, tiny_config

sys.path.append(str(Path(__file__).parents[1] / "parity"))

from mode_rows import TABLE

# Overrides that change neither what exists nor where.
INERT = (
    "train.",
    "recompute.",
    "scheduler.",
    "optimizer.lr",
    "optimizer.adam_eps",
    "optimizer.hysteresis",
    "optimizer.initial_loss_scale",
    "model.cp_comm_type",
    "model.window_size",
    "model.hidden_dropout",
    "model.moe_aux_loss_coeff",
    "model.moe_z_loss_coeff",
)
MORE = {
    "two MTP layers, PP2": (2, ("model.pipeline_model_parallel_size=2", "model.mtp_num_layers=2",
                                "optimizer.use_distributed_optimizer=true")),
    "MTP, tied": (1, ("model.mtp_num_layers=1", "model.share_embeddings_and_output_weights=true")),
    "MTP of experts": (1, ("model.mtp_num_layers=1", "model.num_moe_experts=4",
                           "model.moe_shared_expert_intermediate_size=64",
                           "model.moe_shared_expert_gate=true")),
    "MLA with norms": (1, ("model.num_query_groups=null", "model.multi_latent_attention=true",
                           "model.kv_lora_rank=16", "model.qk_head_dim=16",
                           "model.qk_pos_emb_head_dim=8", "model.v_head_dim=24",
                           "model.qk_layernorm=true")),
    "Gemma 2": (1, ("model.normalize_branch_outputs=true", "model.attn_logit_softcapping=50.0",
                    "model.final_logit_softcapping=30.0", "model.attention_output_bias=true")),
    "FSDP, odd sizes": (2, ("ddp.use_megatron_fsdp=true", "model.hidden_size=36",
                            "model.ffn_hidden_size=52", "model.kv_channels=10")),
}  # fmt: skip


def layout_of(ranks, overrides):
    """Return what tells one layout from another."""
    batch = tuple(o for o in overrides if o.startswith("train.global_batch_size"))
    return ranks, batch + tuple(sorted({o for o in overrides if not o.startswith(INERT)}))


CASES = {f"{r.kind}: {r.name}": layout_of(r.ranks, r.overrides) for r in TABLE} | {
    name: layout_of(*case) for name, case in MORE.items()
}


def size(tensor):
    return tensor.numel() * tensor.element_size()


def local(tensor):
    return getattr(tensor, "_local_tensor", tensor)


def optimizer_tensors(optimizer):
    """Yield what the optimizer updates and keeps, without step counters."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(one, "is_stub_optimizer", False):
            continue
        for parameter, state in one.optimizer.state.items():
            yield local(parameter)
            yield from (local(v) for k, v in state.items() if k != "step" and hasattr(v, "numel"))


def step_with_zeros(optimizer):
    """Make the optimizer's states, which it does for parameters that have a gradient."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        one.optimizer.step()


def plain_bytes(engine):
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    homes = {p.untyped_storage().data_ptr() for p in parameters}
    held = list(optimizer_tensors(engine.optimizer))
    buffers = [b for c in engine.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    used = sum(size(p.main_grad) for p in parameters)
    padded = sum(size(b.param_data) for b in buffers if b.param_data is not None)
    own = sum(map(size, parameters))
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": own,
        "gradient_bytes": used,
        # A float32 parameter that the optimizer updates in place is the model's.
        "optimizer_bytes": sum(
            size(t) for t in held if t.untyped_storage().data_ptr() not in homes
        ),
        "padding_bytes": sum(size(b.grad_data) for b in buffers)
        - used
        + (padded - own if padded else 0),
    }


def sharded_bytes(engine):
    """Count Megatron-FSDP's buffers; what of each is padding follows from its parameters' places."""
    used, padding, elements, main = {"model": 0, "main": 0, "grad": 0}, 0, 0, set()
    for chunk in engine.chunks:
        for group in chunk.param_and_grad_buffer.parameter_groups:
            for kind, buffer in (
                ("model", group.model_weight_buffer),
                ("main", group.main_weight_buffer),
                ("grad", group.main_grad_buffer),
            ):
                if buffer is None:
                    continue
                items = range(len(group.params))
                if buffer.is_data_distributed:
                    slices = [buffer._get_item_slice_in_shard(i) for i in items]
                    count = sum(b - a for a, b in slices if b > a)
                else:
                    count = sum(p.numel() for p in group.params)
                elements += count if kind == "model" else 0
                used[kind] += count * buffer.data.element_size()
                padding += size(buffer.data) - count * buffer.data.element_size()
                main.add(buffer.data.untyped_storage().data_ptr())
    moments = sum(
        size(t)
        for t in optimizer_tensors(engine.optimizer)
        if t.untyped_storage().data_ptr() not in main
    )
    return {
        "parameters": elements,
        "parameter_bytes": used["model"],
        "gradient_bytes": used["grad"],
        "optimizer_bytes": moments + used["main"],
        "padding_bytes": padding,
    }


def count(overrides):
    """Return the bytes of this rank, and where it stands."""
    engine = Engine.from_config(tiny_config(*overrides))
    sharded = engine.config.ddp.use_megatron_fsdp
    if sharded:
        step_with_zeros(engine.optimizer)  # its gradients exist after a backward pass alone
    else:
        engine.optimizer.step()
    found = sharded_bytes(engine) if sharded else plain_bytes(engine)
    layout = engine.layout
    found["place"] = (
        layout.tp_rank, layout.cp_rank, layout.dp_rank, layout.pp_rank, layout.ep_rank
    )  # fmt: skip
    engine.close()
    return found


def count_all(cases):
    """Count for each of *cases*, one after the other in the same processes."""
    results = []
    for overrides in cases:
        try:
            results.append(count(overrides))
        except Exception as error:
            error.add_note(f"while counting {overrides}")
            raise
    return results


@pytest.fixture(scope="module")
def counted():
    found = {}
    layouts = dict.fromkeys(CASES.values())
    for ranks in sorted({n for n, _ in layouts}):
        mine = [case for case in layouts if case[0] == ranks]
        by_rank = run_ranks(count_all, ranks, [case[1] for case in mine], timeout_s=240.0)
        for index, case in enumerate(mine):
            found[case] = [rank[index] for rank in by_rank]
    return found


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_every_rank_are_those_of_the_built_engine(counted, name):
    ranks, overrides = case = CASES[name]
    config = tiny_config(*overrides).finalize(ranks)
    degrees = Degrees.from_config(config)
    for rank in range(ranks):
        place = degrees.place(rank)
        state = stage_state(config, degrees, pp_rank=place.pp_rank, spec="torch")
        planned = state_memory(config, state, state.parts(place))
        expected = dict(counted[case][rank])
        at = (place.tp_rank, place.cp_rank, place.dp_rank, place.pp_rank, place.ep_rank)
        assert at == expected.pop("place")
        assert {key: getattr(planned, key) for key in expected} == expected


def test_the_table_is_covered():
    assert len(TABLE) == len({f"{r.kind}: {r.name}" for r in TABLE}) >= 90
