# SPDX-License-Identifier: Apache-2.0
"""Each patch of the CPU adapter: an operation of megatron-core fails without it, and works with it.

Patches are global, so they are tried in processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from mb_engine.testing import run_ranks
from torch.nn import functional

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the adapter is for machines without CUDA"
    ),
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# Operations; each needs one patch more than the others give.


def wrapped(dtype):
    """Return a small module in megatron-core's data-parallel wrapper."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    class Small(MegatronModule):
        def __init__(self, config):
            super().__init__(config)
            self.linear = torch.nn.Linear(8, 8, dtype=dtype)

        def forward(self, x):
            return self.linear(x)

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    module = Small(config)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config=config, ddp_config=ddp_config, module=module)


def make_gradient_buffers(dtype):
    model = wrapped(dtype)
    model(torch.ones(2, 8, dtype=dtype)).sum().backward()
    model.finish_grad_sync()
    assert model.module.linear.bias.main_grad.tolist() == [2.0] * 8


def rotate_and_compare_hashes(dtype):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.utils import check_param_hashes_across_dp_replicas

    rotary = RotaryEmbedding(
        16, rotary_percent=1.0, use_cpu_initialization=True, cp_group=get_context_parallel_group()
    )
    assert rotary(4).to(dtype).shape == (4, 1, 1, 16)
    assert check_param_hashes_across_dp_replicas([wrapped(dtype)])


def step_optimizer(dtype):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = wrapped(dtype)
    before = model.module.linear.weight.detach().clone()
    config = OptimizerConfig(
        optimizer="adam", lr=0.1, bf16=dtype == torch.bfloat16, params_dtype=dtype, clip_grad=1.0
    )
    optimizer = get_megatron_optimizer(config, [model])
    model(torch.ones(2, 8, dtype=dtype)).sum().backward()
    model.finish_grad_sync()
    updated, norm, _ = optimizer.step()
    assert updated
    # d(sum)/dW is 2 for each of 64 weights and 8 biases.
    assert norm == pytest.approx(2 * 72**0.5)
    assert not torch.equal(before, model.module.linear.weight)


def draw_in_two_states(dtype):
    from megatron.core.tensor_parallel.random import (
        get_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
    )

    def draw():
        ones = torch.ones(64, dtype=dtype)
        outside = functional.dropout(ones, 0.5)
        with get_cuda_rng_tracker().fork():
            inside = functional.dropout(ones, 0.5)
        return outside, inside

    model_parallel_cuda_manual_seed(7)
    (out1, in1), (out2, in2) = draw(), draw()
    model_parallel_cuda_manual_seed(7)
    torch.testing.assert_close(draw(), (out1, in1))
    torch.testing.assert_close(draw(), (out2, in2))
    assert not torch.equal(out1, in1)
    assert not torch.equal(in1, in2)


def time_something(dtype):
    from megatron.core.timers import Timer

    timer = Timer("something")
    timer.start()
    torch.ones(4, dtype=dtype).sum()
    timer.stop()
    assert timer.elapsed(reset=False) >= 0


def dispatch_to_experts(dtype):
    """Send tokens to experts; with two ranks, half of them over the wire."""
    from mb_engine.runtime.megatron_compat import prepare_megatron
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_layer import MoELayer

    prepare_megatron()

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        ffn_hidden_size=16,
        moe_ffn_hidden_size=16,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        add_bias_linear=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl="local",
        moe_router_load_balancing_type="none",
    )
    model_parallel_cuda_manual_seed(3)
    spec = get_gpt_layer_local_spec(num_experts=4).submodules.mlp
    submodules = spec.keywords["submodules"] if hasattr(spec, "keywords") else spec.submodules
    layer = MoELayer(config, submodules=submodules, layer_number=1)
    x = torch.randn(6, 1, 8, dtype=dtype, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0


def exchange_between_stages(dtype):
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    config = ModelParallelConfig(
        pipeline_model_parallel_size=2, pipeline_dtype=dtype, batch_p2p_comm=True
    )
    stages = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
    if parallel_state.is_pipeline_first_stage():
        stages.send_forward(torch.full((2, 3), 7.0, dtype=dtype), False)
    else:
        assert stages.recv_forward((2, 3), False).tolist() == [[7.0] * 3] * 2


def gather_different_numbers(dtype):
    """Gather one row of rank 0 and two of rank 1, and scatter their gradients."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    group = parallel_state.get_tensor_model_parallel_group()
    x = torch.full((1 + group.rank(), 3), 1.0 + group.rank(), dtype=dtype, requires_grad=True)
    rows = gather_from_sequence_parallel_region(x, group=group, output_split_sizes=[1, 2])
    assert rows[:, 0].tolist() == [1.0, 2.0, 2.0]
    (rows * torch.tensor([[1.0], [2.0], [3.0]], dtype=dtype)).sum().backward()
    assert x.grad[:, 0].tolist() == [[2.0], [4.0, 6.0]][group.rank()]


ON_ONE_RANK = {
    "factories": make_gradient_buffers,
    "moves": rotate_and_compare_hashes,
    "type_names": step_optimizer,
    "current_device": draw_in_two_states,
    "synchronize": time_something,
    "streams": dispatch_to_experts,
    "random": draw_in_two_states,
}
ON_TWO_RANKS = {
    "all_to_all": dispatch_to_experts,
    "synchronize": exchange_between_stages,
    "uneven_collectives": gather_different_numbers,
}


# Trying them


def attempt(patches, operation, dtype):
    """Return how *operation* fails with only *patches* in place, or an empty string."""
    replaced = []
    try:
        for patch in patches:
            for new in list(patch.replacements()):
                replaced.append((new.owner, new.name, getattr(new.owner, new.name, None)))
                setattr(new.owner, new.name, new.value)
        operation(dtype)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for owner, name, old in reversed(replaced):
            setattr(owner, name, old)
    return ""


def outcomes(operations, model_parallel):
    """Return by patch and dtype how its operation ends without the patch and with it."""
    warnings.simplefilter("ignore")
    from mb_engine.runtime.megatron_compat import prepare_megatron
    from mb_engine.runtime.megatron_cpu import PATCHES

    prepare_megatron()  # applies none of the patches
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    ends = {}
    for name, operation in operations.items():
        parallel_state.initialize_model_parallel(**model_parallel.get(name, {}))
        others = [patch for patch in PATCHES if patch.name != name]
        for dtype in DTYPES.values():
            without = attempt(others, operation, dtype)
            torch.distributed.barrier()
            ends[name, str(dtype)] = without, attempt(PATCHES, operation, dtype)
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return ends


def one_rank_outcomes():
    return outcomes(ON_ONE_RANK, {})


def two_rank_outcomes():
    degrees = {
        "all_to_all": {"expert_model_parallel_size": 2},
        "synchronize": {"pipeline_model_parallel_size": 2},
        "uneven_collectives": {"tensor_model_parallel_size": 2},
    }
    return outcomes(ON_TWO_RANKS, degrees)


@pytest.fixture(scope="module")
def on_one_rank():
    return run_ranks(one_rank_outcomes, 1, fresh=True)[0]


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(two_rank_outcomes, 2, fresh=True)[0]


NEEDS = {
    "factories": "accelerator|CUDA|NVIDIA",
    "moves": "accelerator|CUDA|NVIDIA",
    "type_names": "AssertionError|Wrapped parameters must be one of",
    "current_device": "CUDA|_cuda_getDevice|NVIDIA",
    "synchronize": "CUDA|NoneType|NVIDIA",
    "streams": "CUDA|_cuda_getCurrentStream|NVIDIA",
    "random": "CUDA|NVIDIA",
    "all_to_all": "incompatible function arguments",
    "uneven_collectives": "invalid tensor size",
}


@pytest.mark.parametrize("dtype", [str(dtype) for dtype in DTYPES.values()])
@pytest.mark.parametrize("patch", ON_ONE_RANK)
def test_a_rank_needs_the_patch(patch, dtype, on_one_rank):
    without, with_it = on_one_rank[patch, dtype]
    assert with_it == ""
    assert re.search(NEEDS[patch], without), without


@pytest.mark.parametrize("dtype", [str(dtype) for dtype in DTYPES.values()])
@pytest.mark.parametrize("patch", ON_TWO_RANKS)
def test_ranks_that_communicate_need_the_patch(patch, dtype, on_two_ranks):
    without, with_it = on_two_ranks[patch, dtype]
    assert with_it == ""
    assert re.search(NEEDS[patch], without), without


def test_every_patch_is_tried_and_says_why():
    from mb_engine.runtime.megatron_cpu import PATCHES

    names = [patch.name for patch in PATCHES]
    assert set(names) == set(ON_ONE_RANK) | set(ON_TWO_RANKS)
    assert len(names) == len(set(names))
    for patch in PATCHES:
        assert patch.reason
        assert all(re.fullmatch(r"[\w/]+\.py:\d+", line) for line in patch.needed_by)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_an_import_patches_nothing_and_a_machine_with_cuda_stays_as_it_is():
    code = """
import torch
from mb_engine.runtime import megatron_cpu
names = [(r.owner, r.name) for p in megatron_cpu.PATCHES for r in p.replacements()]
before = [getattr(o, n, None) for o, n in names]
torch.cuda.is_available = lambda: True
compile_ = torch.compile
with megatron_cpu.eager_import():
    assert torch.compile is compile_
print(megatron_cpu.install(), [getattr(o, n, None) for o, n in names] == before)
torch.cuda.is_available = lambda: False
with megatron_cpu.eager_import():
    assert torch.compile is not compile_
assert torch.compile is compile_
print(megatron_cpu.install(), [getattr(o, n, None) for o, n in names] == before)
after = [getattr(o, n, None) for o, n in names]
print(megatron_cpu.install(), [getattr(o, n, None) for o, n in names] == after)
"""
    assert run_python(code).split() == ["False", "True", "True", "False", "True", "True"]


def test_only_megatron_core_is_told_that_a_tensor_is_on_cuda():
    code = """
import torch
from mb_engine.runtime import megatron_cpu
megatron_cpu.install()
x = torch.ones(2, dtype=torch.bfloat16)
other = {"__name__": "someone.else", "x": x}
core = {"__name__": "megatron.core.optimizer.optimizer", "x": x}
print(x.type(), eval("x.type()", other), eval("x.type()", core), x.is_cuda, x.device)
print(x.type(torch.float32).dtype, x.to("cpu", torch.float64).dtype, x.to(torch.zeros(1)).dtype)
"""
    assert run_python(code).split() == [
        "torch.BFloat16Tensor",
        "torch.BFloat16Tensor",
        "torch.cuda.BFloat16Tensor",
        "False",
        "cpu",
        "torch.float32",
        "torch.float64",
        "torch.float32",
    ]


def test_what_does_not_name_cuda_is_not_redirected():
    from mb_engine.runtime.megatron_cpu import cpu_instead_of_cuda

    cpu = torch.device("cpu")
    for device in ("cuda", "cuda:3", 0, torch.device("cuda", 1)):
        assert cpu_instead_of_cuda(device) == cpu
    for device in ("cpu", "meta", torch.device("meta"), None):
        assert cpu_instead_of_cuda(device) is device


def test_dropout_in_a_tracked_state_logs_no_warning():
    code = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout)
from mb_engine.runtime import megatron_compat, megatron_cpu
megatron_cpu.install()
megatron_compat.prepare_megatron()
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
get_cuda_rng_tracker().add("mine", 5)
with get_cuda_rng_tracker().fork("mine"):
    torch.rand(3)
logging.getLogger("megatron.core.tensor_parallel.random").warning("something else")
"""
    out = run_python(code)
    assert "CPU RNG state changed" not in out
    assert "something else" in out
