# SPDX-License-Identifier: Apache-2.0
"""Planned communication is what ranks hand to the collectives in one step.

The oracle wraps torch.distributed before megatron-core is imported and adds up, at the outermost
call, what a ring algorithm sends for it. What the planner leaves out are scalars: the numbers of
tokens, gradient norms and losses.
"""

from __future__ import annotations

import functools

import pytest
import torch
from mb_engine.plan import plan
from mb_engine.testing import run_ranks, tiny_config

SCALARS_BYTES = 512
BASE = ["model.num_layers=2", "train.micro_batch_size=1", "train.global_batch_size=4"]
TP2 = ["model.tensor_model_parallel_size=2"]
SP = [*TP2, "model.sequence_parallel=true"]
PP2 = ["model.pipeline_model_parallel_size=2", "model.num_layers=4"]
CP2 = ["model.context_parallel_size=2"]
FULL = [
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
]
MOE = ["model.num_moe_experts=4", "model.expert_model_parallel_size=2"]

CASES = {
    "TP2": TP2,
    "TP2, full recomputation": TP2 + FULL,
    "TP2 + SP": SP,
    "TP2 + SP, full recomputation": SP + FULL,
    "PP2": PP2,
    "PP2, tied embeddings": [*PP2, "model.share_embeddings_and_output_weights=true"],
    "PP2, VPP2": [*PP2, "model.virtual_pipeline_model_parallel_size=2"],
    "CP2, ring": [*CP2, "model.cp_comm_type=p2p"],
    "CP2, all-gather": [*CP2, "model.cp_comm_type=all_gather"],
    "CP2, all-to-all": [*CP2, "model.cp_comm_type=a2a"],
    "DP2": [],
    "DP2, bf16": ["mixed_precision=bf16_mixed"],
    "DP2, distributed optimizer": ["optimizer.use_distributed_optimizer=true"],
    "DP2, distributed optimizer, bf16": [
        "optimizer.use_distributed_optimizer=true",
        "mixed_precision=bf16_mixed",
    ],
    "EP2, allgather": MOE,
    "EP2, alltoall": [*MOE, "model.moe_token_dispatcher_type=alltoall"],
}


class Counter:
    """Adds up what collectives send while it is on; a collective made of others counts once."""

    def __init__(self):
        self.sent = 0.0
        self.depth = 0
        self.on = False

    def wrap(self, name, sent):
        original = getattr(torch.distributed, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def counted(*args, **kwargs):
            if self.on and self.depth == 0:
                self.sent += sent(args, kwargs)
            self.depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self.depth -= 1

        for module in (torch.distributed, torch.distributed.distributed_c10d):
            setattr(module, name, counted)

    def install(self):
        for name in ("all_gather_into_tensor", "_all_gather_base", "all_gather_single"):
            self.wrap(
                name, lambda a, k: (_ranks(a, k) - 1) * _size(a, k, 1, "input_tensor", "input")
            )
        self.wrap("all_gather", lambda a, k: (_ranks(a, k) - 1) * _size(a, k, 1, "tensor"))
        for name in ("reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter_single"):
            self.wrap(
                name, lambda a, k: (_ranks(a, k) - 1) * _size(a, k, 0, "output", "output_tensor")
            )
        self.wrap(
            "all_reduce",
            lambda a, k: 2 * (_ranks(a, k) - 1) / _ranks(a, k) * _size(a, k, 0, "tensor"),
        )
        self.wrap(
            "all_to_all_single",
            lambda a, k: (_ranks(a, k) - 1) / _ranks(a, k) * _size(a, k, 1, "input"),
        )
        for name in ("isend", "send"):
            self.wrap(name, lambda a, k: _size(a, k, 0, "tensor"))
        self.wrap(
            "batch_isend_irecv",
            lambda a, k: sum(_bytes(op.tensor) for op in a[0] if "isend" in op.op.__name__),
        )


def _bytes(tensor):
    return tensor.numel() * tensor.element_size()


def _size(args, kwargs, place, *names):
    found = next((kwargs[n] for n in names if n in kwargs), None)
    return _bytes(args[place] if found is None else found)


def _ranks(args, kwargs):
    group = kwargs.get("group")
    if group is None:
        group = next((a for a in args if isinstance(a, torch.distributed.ProcessGroup)), None)
    return torch.distributed.get_world_size(group)


def counted(overrides, counter):
    """Return what this rank sends in one step."""
    from mb_engine import Engine

    engine = Engine.from_config(tiny_config(*BASE, *overrides))
    config = engine.config
    rows, length = config.train.micro_batch_size, config.model.seq_length
    ids = torch.randint(0, config.model.vocab_size, (rows, length))
    batch = {
        "tokens": ids,
        "labels": ids,
        "loss_mask": torch.ones(rows, length),
        "position_ids": torch.arange(length).expand(rows, -1),
    }
    counter.sent, counter.on = 0.0, True
    engine.forward_backward([batch] * config.train.num_microbatches)
    engine.optimizer_step()
    counter.on = False
    engine.close()
    return counter.sent


def count_all(cases):
    """Count for each of *cases*, one after the other in the same processes."""
    counter = Counter()
    counter.install()
    return [counted(overrides, counter) for overrides in cases]


@pytest.fixture(scope="module")
def sent():
    by_rank = run_ranks(count_all, 2, list(CASES.values()), timeout_s=240.0, fresh=True)
    return dict(zip(CASES, zip(*by_rank, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_is_what_a_rank_sends_in_a_step(sent, name):
    made = plan(tiny_config(*BASE, *CASES[name]), world_size=2)
    routed = "alltoall" in CASES[name][-1] if CASES[name] else False
    for rank in range(2):
        planned = sum(t.sent_bytes for t in made.rank(rank).traffic)
        # Which expert a token goes to is the router's choice, and its weight travels with it.
        tolerance = 0.1 if routed else 0.001
        assert planned == pytest.approx(sent[name][rank], rel=tolerance, abs=SCALARS_BYTES)
