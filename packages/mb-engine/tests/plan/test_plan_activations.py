# SPDX-License-Identifier: Apache-2.0
"""Planned activation memory is what autograd keeps in built models.

The oracle packs every tensor that is saved for a backward pass and adds up the storages that are
alive, each once and without parameters; the largest sum of a step is compared. It runs whole steps
with several micro-batches, so that pipelines have as many in flight as the schedule lets them.

Tolerance: 5 %. Counted but for a few scalars, most shapes agree to 1 %; masks of context parallelism
and the map of tokens to experts are rounder.
"""

from __future__ import annotations

import pytest
import torch
from mb_engine import Engine
from mb_engine.plan.activations import chunk_activations
from mb_engine.plan.layout import Degrees
from mb_engine.plan.pipeline import activation_peak, passes
from mb_engine.testing import run_ranks, tiny_config

TOLERANCE = 0.05
BASE = [
    "model.num_layers=2",
    "model.seq_length=64",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    "train.train_iters=1",
]
TP2 = ["model.tensor_model_parallel_size=2"]
PP2 = ["model.pipeline_model_parallel_size=2", "model.num_layers=4"]
VPP2 = ["model.virtual_pipeline_model_parallel_size=2"]
MOE = ["model.num_moe_experts=4", "model.moe_token_dispatcher_type=alltoall"]
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
SELECTIVE = ["recompute.recompute_granularity=selective"]
FULL = [
    "recompute.recompute_granularity=full",
    "recompute.recompute_method=uniform",
    "recompute.recompute_num_layers=1",
]
GPT2 = [
    "model.normalization=LayerNorm",
    "model.add_bias_linear=true",
    "model.gated_linear_unit=false",
    "model.activation_func=gelu",
    "model.position_embedding_type=learned_absolute",
    "model.num_query_groups=4",
]
WIDE = ["model.hidden_size=128", "model.num_attention_heads=8", "model.ffn_hidden_size=320"]

LATENT = [
    "model.num_query_groups=null",
    "model.multi_latent_attention=true",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=16",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=16",
]
BF16 = ["mixed_precision=bf16_mixed"]
AHEAD = ["model.mtp_num_layers=1"]

CASES = {
    "MLA": (1, LATENT),
    "MLA, values as wide as keys": (1, [*LATENT, "model.v_head_dim=24"]),
    "MLA with norms, bf16": (1, [*LATENT, *BF16, "model.qk_layernorm=true"]),
    "MLA with norms, queries not compressed": (
        1,
        [*LATENT, "model.q_lora_rank=null", "model.qk_layernorm=true"],
    ),
    "MTP": (1, AHEAD),
    "two MTP layers, bf16": (1, ["model.mtp_num_layers=2", *BF16]),
    "MTP, full": (1, [*AHEAD, *FULL]),
    "soft-capping": (
        1,
        ["model.attn_logit_softcapping=50.0", "model.final_logit_softcapping=30.0"],
    ),
    "Gemma 2, bf16": (
        1,
        [*BF16, "model.final_logit_softcapping=30.0", "model.normalize_branch_outputs=true"],
    ),
    "residuals in float32": (1, [*BF16, "model.fp32_residual_connection=true"]),
    "MoE, gated shared expert": (
        1,
        [*MOE, "model.moe_shared_expert_intermediate_size=64", "model.moe_shared_expert_gate=true"],
    ),
    "MoE, half the capacity, padded": (
        1,
        [
            *MOE,
            "model.moe_expert_capacity_factor=0.5",
            "model.moe_pad_expert_input_to_capacity=true",
        ],
    ),
    "MLA, TP2 + SP": (2, [*LATENT, *TP2, "model.sequence_parallel=true"]),
    "MLA, CP2, ring": (2, [*LATENT, "model.context_parallel_size=2"]),
    "MLA, CP2, all-gather": (
        2,
        [*LATENT, "model.context_parallel_size=2", "model.cp_comm_type=all_gather"],
    ),
    "MTP, PP2": (2, [*AHEAD, *PP2]),
    "MTP, TP2 + SP": (2, [*AHEAD, *TP2, "model.sequence_parallel=true"]),
    "GQA, gated": (1, []),
    "wider, longer": (1, [*WIDE, "model.seq_length=128"]),
    "micro-batches of 4": (1, ["train.micro_batch_size=4"]),
    "as many groups as heads": (1, ["model.num_query_groups=4"]),
    "one group": (1, ["model.num_query_groups=1"]),
    "large vocabulary": (1, ["model.vocab_size=2048"]),
    "bf16": (1, ["mixed_precision=bf16_mixed"]),
    "LayerNorm, gelu, biases": (1, GPT2),
    "LayerNorm, gelu, biases, dropout": (1, GPT2 + DROPOUT),
    "dropout": (1, DROPOUT),
    "squared relu": (1, ["model.gated_linear_unit=false", "model.activation_func=squared_relu"]),
    "query and key norms": (1, ["model.qk_layernorm=true"]),
    "selective: core attention": (1, SELECTIVE),
    "selective: MLP": (1, [*SELECTIVE, "recompute.recompute_modules=[mlp]"]),
    "full": (1, FULL),
    "full, one layer of three": (
        1,
        [*FULL[:1], "recompute.recompute_method=block", *FULL[2:], "model.num_layers=3"],
    ),
    "MoE": (1, MOE),
    "MoE, selective: experts": (1, [*MOE, *SELECTIVE, "recompute.recompute_modules=[moe]"]),
    "MoE, shared expert, aux loss": (
        1,
        [MOE[0], "model.moe_aux_loss_coeff=0.01", "model.moe_shared_expert_intermediate_size=64"],
    ),
    "TP2": (2, TP2),
    "TP2 + SP": (2, [*TP2, "model.sequence_parallel=true"]),
    "TP2, full, shared": (2, [*TP2, *FULL, "recompute.distribute_saved_activations=true"]),
    "CP2, all-gather": (2, ["model.context_parallel_size=2", "model.cp_comm_type=all_gather"]),
    "CP2, ring": (2, ["model.context_parallel_size=2", "model.cp_comm_type=p2p"]),
    "CP2, all-to-all": (2, ["model.context_parallel_size=2", "model.cp_comm_type=a2a"]),
    "PP2": (2, PP2),
    "PP2, VPP2": (2, PP2 + VPP2),
    "PP2, full": (2, PP2 + FULL),
    "EP2": (2, [*MOE, "model.expert_model_parallel_size=2"]),
}


class Meter:
    """Adds up the storages that are saved for a backward pass, each as long as it is held."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.held = {}
        self.peak = 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.parameters or storage.nbytes() == 0:
            return tensor
        return Held(self, tensor)

    def unpack(self, packed):
        return packed.tensor if isinstance(packed, Held) else packed

    def measure(self):
        # A storage that recomputation emptied counts as it is now.
        self.peak = max(self.peak, sum(storage.nbytes() for _, storage in self.held.values()))


class Held:
    """One saved tensor; its storage counts until the last such record is gone."""

    def __init__(self, meter, tensor):
        storage = tensor.untyped_storage()
        self.meter, self.tensor, self.key = meter, tensor, storage.data_ptr()
        count, _ = meter.held.get(self.key, (0, None))
        meter.held[self.key] = count + 1, storage
        if count == 0:
            meter.measure()

    def __del__(self):
        count, storage = self.meter.held.pop(self.key)
        if count > 1:
            self.meter.held[self.key] = count - 1, storage


def batches(config):
    rows, length = config.train.micro_batch_size, config.model.seq_length
    ids = torch.randint(0, config.model.vocab_size, (rows, length + 1))
    return [
        {
            "tokens": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "loss_mask": torch.ones(rows, length),
            "position_ids": torch.arange(length).expand(rows, -1),
        }
        for _ in range(config.train.num_microbatches)
    ]


def measured(overrides):
    """Return the most bytes kept at once in one step, and the stage they were kept in."""
    engine = Engine.from_config(tiny_config(*BASE, *overrides))
    data = batches(engine.config)
    meter = Meter({p.untyped_storage().data_ptr() for c in engine.chunks for p in c.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
        engine.forward_backward(data)
    stage = engine.layout.pp_rank
    engine.close()
    return stage, meter.peak


def measure_all(cases):
    """Measure each of *cases*, one after the other in the same processes."""
    return [measured(overrides) for overrides in cases]


@pytest.fixture(scope="module")
def peaks():
    found = {}
    for ranks in (1, 2):
        names = [name for name, (n, _) in CASES.items() if n == ranks]
        by_rank = run_ranks(measure_all, ranks, [CASES[n][1] for n in names], timeout_s=240.0)
        for index, name in enumerate(names):
            found[name] = [rank[index] for rank in by_rank]
    return found


def planned(overrides, ranks, stage):
    config = tiny_config(*BASE, *overrides).finalize(ranks)
    degrees = Degrees.from_config(config)
    chunks = [
        chunk_activations(config, degrees, pp_rank=stage, chunk=c, spec="torch", device="cpu")
        for c in range(degrees.vpp)
    ]
    count = config.train.num_microbatches
    return activation_peak(chunks, passes(degrees, pp_rank=stage, num_microbatches=count))


@pytest.mark.parametrize("name", CASES)
def test_is_what_autograd_keeps(peaks, name):
    ranks, overrides = CASES[name]
    stages = {stage for stage, _ in peaks[name]}
    for stage in stages:
        # Tokens are not spread evenly over experts: ranks of a stage differ around their mean.
        of_stage = [peak for at, peak in peaks[name] if at == stage]
        mean = sum(of_stage) / len(of_stage)
        assert planned(overrides, ranks, stage) == pytest.approx(mean, rel=TOLERANCE)


class TestPipelines:
    def one_f_one_b(self, pp, stage, count):
        degrees = Degrees(tp=1, cp=1, dp=1, pp=pp, vpp=1, ep=1, etp=1, edp=1)
        return self.in_flight(passes(degrees, pp_rank=stage, num_microbatches=count))

    def in_flight(self, schedule):
        held = peak = 0
        for forward, _ in schedule:
            held += 1 if forward else -1
            peak = max(peak, held)
        assert held == 0
        return peak

    def test_a_stage_holds_as_many_micro_batches_as_stages_follow_and_one(self):
        assert [self.one_f_one_b(4, stage, 16) for stage in range(4)] == [4, 3, 2, 1]

    def test_no_more_micro_batches_are_held_than_there_are(self):
        assert self.one_f_one_b(8, 0, 3) == 3

    @pytest.mark.parametrize(("pp", "vpp"), [(2, 2), (4, 2), (4, 3)])
    def test_interleaving_holds_more_chunks_by_the_published_factor(self, pp, vpp):
        # Korthikanti et al. 2022, section 4.2.3: the first stage holds L (1 + (p - 1) / (p m))
        # layers, here with one layer a chunk and L = p m.
        degrees = Degrees(tp=1, cp=1, dp=1, pp=pp, vpp=vpp, ep=1, etp=1, edp=1)
        schedule = passes(degrees, pp_rank=0, num_microbatches=4 * pp)
        layers = pp * vpp * (1 + (pp - 1) / (pp * vpp))
        assert self.in_flight(schedule) == layers

    def test_backward_passes_take_chunks_in_the_opposite_order(self):
        degrees = Degrees(tp=1, cp=1, dp=1, pp=2, vpp=2, ep=1, etp=1, edp=1)
        order = list(passes(degrees, pp_rank=1, num_microbatches=2))
        assert [c for forward, c in order if forward] == [0, 0, 1, 1]
        assert [c for forward, c in order if not forward] == [1, 1, 0, 0]
