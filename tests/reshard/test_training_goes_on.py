# SPDX-License-Identifier: Apache-2.0
"""A run that is saved in one layout and loaded in another is one run: same state, same losses."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from mb_engine.testing import run_ranks
from resharding import STEPS, Part, begin_all, go_on_all

TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
PP2 = ("model.pipeline_model_parallel_size=2",)
VPP2 = (*PP2, "model.virtual_pipeline_model_parallel_size=2")
CP2 = ("model.context_parallel_size=2",)
EP2 = ("model.expert_model_parallel_size=2", "model.moe_token_dispatcher_type=alltoall")
SPLIT = ("optimizer.use_distributed_optimizer=true",)
OVERLAP = (
    *SPLIT, "ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true", "ddp.bucket_size=4096",
)  # fmt: skip
FSDP = ("ddp.use_megatron_fsdp=true", "ddp.data_parallel_sharding_strategy=optim_grads_params")
MOE = ("model.num_moe_experts=4", "model.moe_layer_freq=[0, 1, 0, 1]", "model.moe_router_topk=2")
BF16 = ("mixed_precision=bf16_mixed",)
DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")


class Layout(NamedTuple):
    ranks: int
    overrides: tuple[str, ...] = ()


LAYOUTS = {
    "one rank": Layout(1),
    "TP2": Layout(2, TP2),
    "PP2": Layout(2, PP2),
    "PP2 VPP2": Layout(2, VPP2),
    "CP2": Layout(2, CP2),
    "DP2": Layout(2),
    "DP2 split": Layout(2, OVERLAP),
    "FSDP2": Layout(2, FSDP),
    "EP2": Layout(2, EP2),
    "EP2 split": Layout(2, (*EP2, *SPLIT)),
    "DP4 split": Layout(4, SPLIT),
    "TP2 PP2": Layout(4, (*TP2, *PP2)),
}
MODELS = {"dense": (), "experts": MOE, "bf16": BF16, "dropout": DROPOUT}
PAIRS = [
    ("dense", "one rank", "TP2"),
    ("dense", "one rank", "DP4 split"),
    ("dense", "TP2", "PP2"),
    ("dense", "PP2", "DP2 split"),
    ("dense", "PP2", "PP2 VPP2"),
    ("dense", "PP2 VPP2", "TP2"),
    ("dense", "DP2 split", "CP2"),
    ("dense", "CP2", "FSDP2"),
    ("dense", "FSDP2", "one rank"),
    ("dense", "FSDP2", "TP2 PP2"),
    ("dense", "DP4 split", "FSDP2"),
    ("dense", "TP2 PP2", "DP2"),
    ("experts", "one rank", "EP2"),
    ("experts", "EP2", "TP2"),
    ("experts", "EP2 split", "FSDP2"),
    ("experts", "TP2", "EP2 split"),
    ("experts", "FSDP2", "one rank"),
    ("bf16", "TP2", "DP2 split"),
    ("bf16", "DP2 split", "FSDP2"),
    ("dropout", "TP2", "TP2"),
]
NAMES = [f"{model}: {source} to {target}" for model, source, target in PAIRS]

# The losses are near 5. With all values the same, a layout changes the order of float32 additions
# alone: a few roundings of 6e-8 relative a step, which Adam carries on; bf16 activations keep 8 bits,
# 4e-3 relative. The same bounds as in the table of modes. Random states go on in the same layout
# alone, and there all operations are the same in the same order.
TOLERANCE = {"dense": 1e-5, "experts": 1e-5, "bf16": 1e-2, "dropout": 0.0}


def parts(ranks, by):
    """Return the sources or the targets that take *ranks* ranks, each once, with their names."""
    chosen = {}
    for name, (model, *ends) in zip(NAMES, PAIRS, strict=True):
        layout = LAYOUTS[ends[by]]
        if layout.ranks == ranks:
            part = Part(f"{model}, {ends[0]}", (*MODELS[model], *layout.overrides))
            chosen[name if by else part.name] = part
    return chosen


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each pair's two halves: what the source was and became, and what the target found."""
    folder = str(tmp_path_factory.mktemp("runs"))
    for ranks in (1, 2, 4):
        run_ranks(begin_all, ranks, folder, list(parts(ranks, 0).values()), timeout_s=200)
    found = {}
    for ranks in (1, 2, 4):
        targets = parts(ranks, 1)
        by_rank = run_ranks(go_on_all, ranks, folder, list(targets.values()), timeout_s=200)
        found |= {name: [rank[i] for rank in by_rank] for i, name in enumerate(targets)}
    sources = {
        name: torch.load(f"{folder}/{model}, {source}.pt", weights_only=True)
        for name, (model, source, _) in zip(NAMES, PAIRS, strict=True)
    }
    return {name: (sources[name], found[name]) for name in NAMES}


@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
def test_all_parameters_and_moments_are_those_that_were_saved(runs, name):
    source, ranks = runs[name]
    assert ranks[0]["wrong"] == []
    assert ranks[0]["keys"] == len(source["whole"])
    second = [k for k in source["whole"] if ".exp_avg_sq." in k]
    assert len(second) >= 10
    assert all(source["whole"][k].abs().sum() > 0 for k in second), "nothing was trained"


@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_along_the_curve_of_the_run_that_saved(runs, name):
    source, ranks = runs[name]
    tolerance = TOLERANCE[name.split(":", maxsplit=1)[0]]
    for seen in ranks:
        assert seen["progress"] == (STEPS, 8 * STEPS)
        assert seen["losses"] == pytest.approx(source["losses"], rel=0, abs=tolerance)
        assert seen["rates"] == source["rates"]
        gained = abs(seen["fresh"] - source["losses"][0])
        assert gained > max(1e-3, 2 * tolerance), "the load must have mattered"
    assert len({rate for rate, _ in source["rates"]}) == STEPS
    assert len({decay for _, decay in source["rates"]}) == STEPS


def test_every_kind_of_parallelism_is_saved_and_loaded():
    for kind in ("TP2", "PP2", "VPP2", "CP2", "EP2", "DP2", "DP4", "FSDP2", "one rank"):
        sources = [s for _, s, t in PAIRS if kind in s and s != t]
        targets = [t for _, s, t in PAIRS if kind in t and s != t]
        assert sources, kind
        assert targets, kind
