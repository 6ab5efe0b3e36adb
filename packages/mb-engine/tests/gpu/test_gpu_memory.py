# SPDX-License-Identifier: Apache-2.0
"""Recomputation, offloading, CUDA graphs and compilation change time and memory, not losses.

The same kernels on the same numbers differ by the order of atomic additions alone: 1e-3 over 20
steps in bfloat16, where one rounding of a loss near 5 is 2e-2 and the losses are kept in float32.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gpu_training import BF16, CUDA, SHARDED, TE, TORCH, losses_of, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)
FULL = (
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
)
SELECTIVE = (
    "recompute.recompute_granularity=selective",
    "recompute.recompute_modules=[core_attn, layernorm, mlp]",
)
GRAPHS = ("rng.te_rng_tracker=true", "train.check_for_nan_in_loss=false")
SPECS = [pytest.param(TORCH, id="torch"), pytest.param(TE, id="te", marks=needs_te)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective"])
def test_recomputation_keeps_the_losses(spec, recompute):
    base = losses_of(*CUDA, *spec, *BF16)
    assert losses_of(*CUDA, *spec, *BF16, *recompute) == pytest.approx(base, abs=1e-3)


@needs_te
@pytest.mark.parametrize(
    "graph",
    [
        pytest.param("{cuda_graph_impl: local}", id="layers, megatron-core"),
        pytest.param("{cuda_graph_impl: transformer_engine}", id="layers, Transformer Engine"),
        pytest.param(
            "{cuda_graph_impl: local, cuda_graph_scope: [full_iteration]}", id="full iteration"
        ),
    ],
)
@pytest.mark.parametrize("sharded", [(), SHARDED], ids=["plain", "distributed optimizer"])
def test_cuda_graphs_give_the_losses_of_eager_steps(graph, sharded):
    """Also after the capture: a graph that replayed old inputs would stop learning at step 4."""
    base = losses_of(*CUDA, *TE, *BF16, *GRAPHS, *sharded)
    captured = losses_of(*CUDA, *TE, *BF16, *GRAPHS, *sharded, f"cuda_graph={graph}")
    assert captured == pytest.approx(base, abs=1e-3)


def test_a_whole_iteration_of_the_torch_layers_can_be_captured():
    """The random states of Transformer Engine are what needs it, not the layers."""
    pytest.importorskip("transformer_engine")
    base = losses_of(*CUDA, *TORCH, *BF16, *GRAPHS)
    graph = "cuda_graph={cuda_graph_impl: local, cuda_graph_scope: [full_iteration]}"
    assert losses_of(*CUDA, *TORCH, *BF16, *GRAPHS, graph) == pytest.approx(base, abs=1e-3)


@needs_te
@pytest.mark.parametrize("weights", ["false", "true"])
def test_offloaded_activations_and_weights_come_back_unchanged(weights):
    base = losses_of(*CUDA, *TE, *BF16)
    offload = (
        "offload={cpu_offloading: true, cpu_offloading_num_layers: 3, "
        f"cpu_offloading_weights: {weights}}}"
    )
    interface = "env_vars={NVTE_CPU_OFFLOAD_V1: 1}"
    assert losses_of(*CUDA, *TE, *BF16, offload, interface) == pytest.approx(base, abs=1e-3)


@pytest.mark.parametrize("fraction", ["0.5", "1.0"])
def test_an_optimizer_on_the_host_makes_the_same_steps(fraction):
    """Adam on the CPU rounds elsewhere than on the GPU: 5e-3."""
    base = losses_of(*CUDA, *TORCH, *BF16, *SHARDED)
    offload = (
        "offload={optimizer_cpu_offload: true, overlap_cpu_optimizer_d2h_h2d: true, "
        f"optimizer_offload_fraction: {fraction}}}"
    )
    assert losses_of(*CUDA, *TORCH, *BF16, *SHARDED, offload) == pytest.approx(base, abs=5e-3)


def test_a_compiled_activation_keeps_the_losses_and_takes_less_memory():
    """It rounds once where two kernels rounded twice: 0.02, under half of bfloat16's bound."""
    base = run(*CUDA, *TORCH, *BF16)
    compiled = run(*CUDA, *TORCH, *BF16, "model.torch_compile=true")
    assert compiled["losses"] == pytest.approx(base["losses"], abs=0.02)
    assert compiled["peak_bytes"] <= base["peak_bytes"]
