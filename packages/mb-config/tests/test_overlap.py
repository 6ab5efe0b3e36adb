# SPDX-License-Identifier: Apache-2.0
"""What overlaps by itself, and that explain says why."""

from __future__ import annotations

import pytest

SHARDED = "optimizer.use_distributed_optimizer=true"
VPP = (
    "model.pipeline_model_parallel_size=2",
    "model.virtual_pipeline_model_parallel_size=2",
)


def test_the_distributed_optimizer_overlaps_on_gpus(small):
    resolved = small.override(SHARDED).finalize(4)
    ddp = resolved.ddp
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather, ddp.align_param_gather) == (
        (True, True, False)
    )
    assert resolved.optimizer.overlap_param_gather
    assert resolved.explain("ddp.overlap_grad_reduce") == (
        "ddp.overlap_grad_reduce = True, derived: distributed optimizer over 4 ranks, DP x CP"
    )
    assert resolved.explain("ddp.align_param_gather").endswith("derived: off: no virtual stages")


@pytest.mark.parametrize(
    ("overrides", "ranks", "why"),
    [
        ((SHARDED,), 1, "off: one data-parallel rank has nobody to exchange with"),
        ((), 4, "off: no use_distributed_optimizer, which splits the exchange into buckets"),
        ((SHARDED, "dist.device=cpu"), 4, "off: gloo takes the cores that compute"),
    ],
)
def test_what_stays_off_says_why(small, overrides, ranks, why):
    resolved = small.override(*overrides).finalize(ranks)
    assert resolved.explain("ddp.overlap_grad_reduce").endswith(f"= False, derived: {why}")
    assert resolved.ddp.overlap_param_gather is False
    assert resolved.ddp.bucket_size is None


def test_context_parallel_ranks_count_as_data_parallel_ones(small):
    made = small.override(SHARDED, "model.context_parallel_size=4")
    assert made.finalize(4).ddp.overlap_grad_reduce is True


@pytest.mark.parametrize(("ranks", "parameters"), [(2, 40_000_000), (64, 64_000_000)])
def test_buckets_grow_with_the_ranks(small, ranks, parameters):
    made = small.override(SHARDED, "train.global_batch_size=64").finalize(ranks)
    assert made.ddp.bucket_size == parameters
    assert f"1,000,000 x data_parallel_size {ranks}" in made.explain("ddp.bucket_size")


def test_a_bucket_size_of_ones_own_stays(small):
    assert small.override(SHARDED, "ddp.bucket_size=9").finalize(2).ddp.bucket_size == 9


def test_what_the_user_switches_off_stays_off(small):
    reduced = small.override(SHARDED, "ddp.overlap_param_gather=false").finalize(4).ddp
    assert (reduced.overlap_grad_reduce, reduced.overlap_param_gather) == (True, False)
    neither = small.override(SHARDED, "ddp.overlap_grad_reduce=false").finalize(4).ddp
    assert (neither.overlap_grad_reduce, neither.overlap_param_gather) == (False, False)


def test_a_gather_that_was_asked_for_brings_the_reduction_with_it(small):
    made = small.override(SHARDED, "dist.device=cpu", "optimizer.overlap_param_gather=true")
    resolved = made.finalize(4)
    assert (resolved.ddp.overlap_grad_reduce, resolved.ddp.overlap_param_gather) == (True, True)
    assert resolved.explain("ddp.overlap_grad_reduce").endswith("overlap_param_gather needs it")


def test_gathers_of_interleaved_stages_start_together(small):
    resolved = small.override(SHARDED, *VPP).finalize(4)
    assert resolved.ddp.align_param_gather is True
    assert resolved.comm_overlap.overlap_p2p_comm is True
    on_cpu = small.override(SHARDED, *VPP, "dist.device=cpu", "ddp.overlap_param_gather=true")
    assert on_cpu.finalize(4).explain("ddp.align_param_gather").endswith("cores that compute")


def test_a_whole_graph_holds_no_gather_hooks(small):
    graph = "cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [full_iteration]}"
    made = small.override(
        SHARDED, graph, "rng.te_rng_tracker=true", "train.check_for_nan_in_loss=false"
    )
    resolved = made.finalize(4)
    assert (resolved.ddp.overlap_grad_reduce, resolved.ddp.overlap_param_gather) == (True, False)
    assert "full-iteration CUDA graph" in resolved.explain("ddp.overlap_param_gather")


@pytest.mark.parametrize(
    ("overrides", "p2p"),
    [
        ((), (False, False)),
        (VPP[:1], (False, True)),
        (VPP, (True, False)),
    ],
)
def test_pipelines_overlap_their_sends_where_stages_are_interleaved(small, overrides, p2p):
    resolved = small.override(*overrides).finalize(4)
    overlap = resolved.comm_overlap
    assert (overlap.overlap_p2p_comm, overlap.batch_p2p_comm) == p2p
    assert "pipeline" in resolved.explain("comm_overlap.overlap_p2p_comm")


def test_decisions_follow_when_the_layout_changes(small):
    resolved = small.override(SHARDED).finalize(4)
    again = resolved.finalize(1)
    assert (again.ddp.overlap_grad_reduce, again.ddp.bucket_size) == (False, None)
