# SPDX-License-Identifier: Apache-2.0
"""Plans of whole jobs, the search for layouts, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from mb_config.errors import ConfigError
from mb_engine.cli import main
from mb_engine.data import build_tokenizer
from mb_engine.errors import EngineError
from mb_engine.model.flops import flops_per_token
from mb_engine.plan import GPUS, Degrees, plan, search
from mb_engine.plan.activations import chunk_activations
from mb_engine.plan.hardware import gpu_named
from mb_engine.plan.layouts import layouts
from mb_engine.plan.pipeline import activation_peak, bubble_fraction, passes
from mb_engine.plan.ranks import with_vocabulary
from mb_engine.plan.search import _least_recomputed, _on_one_replica
from mb_engine.testing import tiny_config

GIB = 1 << 30
LLAMA_70B = [
    "model.num_layers=80",
    "model.hidden_size=8192",
    "model.num_attention_heads=64",
    "model.num_query_groups=8",
    "model.ffn_hidden_size=28672",
    "model.seq_length=8192",
    "model.vocab_size=128256",
    "train.micro_batch_size=1",
    "train.global_batch_size=512",
    "mixed_precision=bf16_mixed",
    "dist.device=auto",
]
MIXTRAL = [
    "model.num_layers=32",
    "model.hidden_size=4096",
    "model.num_attention_heads=32",
    "model.num_query_groups=8",
    "model.ffn_hidden_size=14336",
    "model.seq_length=4096",
    "model.vocab_size=32000",
    "model.num_moe_experts=8",
    "model.moe_token_dispatcher_type=alltoall",
    "model.moe_grouped_gemm=true",
    "train.micro_batch_size=1",
    "train.global_batch_size=256",
    "mixed_precision=bf16_mixed",
    "dist.device=auto",
]
LAID_OUT = [
    "model.tensor_model_parallel_size=8",
    "model.sequence_parallel=true",
    "model.pipeline_model_parallel_size=4",
    "model.virtual_pipeline_model_parallel_size=5",
    "ddp.use_distributed_optimizer=true",
]


@pytest.fixture(scope="module")
def llama():
    return plan(tiny_config(*LLAMA_70B, *LAID_OUT), world_size=64, gpu="h100-80gb")


@pytest.fixture(scope="module")
def found():
    return search(tiny_config(*LLAMA_70B), gpus=64, gpu="h100-80gb", keep=5)


class TestPlan:
    def test_every_rank_is_in_one_group(self, llama):
        assert sorted(r for group in llama.groups for r in group.ranks) == list(range(64))

    def test_parameters_add_up_to_the_model(self, llama):
        # Of one replica; norms are on all tensor-parallel ranks.
        held = sum(llama.rank(stage * 16).state.parameters for stage in range(4)) * 8
        embeddings, layer = 2 * 128256 * 8192, 8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672
        norms = (2 * 80 + 1) * 8192
        assert held == embeddings + 80 * layer + 8 * norms

    def test_flops_of_the_ranks_add_up_to_those_of_the_step(self, llama):
        total = sum(group.model_flops * len(group.ranks) for group in llama.groups)
        assert total == pytest.approx(llama.model_flops, rel=1e-12)
        tokens = 512 * 8192
        assert llama.model_flops == pytest.approx(flops_per_token(llama.config) * tokens)

    def test_flops_of_stages_with_and_without_experts_differ(self):
        config = tiny_config(
            "model.pipeline_model_parallel_size=2",
            "model.num_moe_experts=4",
            "model.moe_layer_freq=[0,0,1,1]",
        )
        made = plan(config, world_size=2)
        assert made.rank(0).model_flops < made.rank(1).model_flops
        total = sum(group.model_flops * len(group.ranks) for group in made.groups)
        assert total == pytest.approx(made.model_flops, rel=1e-12)

    def test_state_is_what_the_sizes_of_mixed_precision_say(self, llama):
        state = llama.rank(0).state
        assert state.parameter_bytes == 2 * state.parameters
        assert state.gradient_bytes == 4 * state.parameters
        # Float32 weights and two moments, split between two replicas but for rounding of buckets.
        assert state.optimizer_bytes == pytest.approx(12 * state.parameters / 2, rel=1e-4)

    def test_a_gpu_that_is_too_small_does_not_fit(self, llama):
        assert llama.fits
        assert not plan(tiny_config(*LLAMA_70B, *LAID_OUT), world_size=64, gpu="a100-40gb").fits

    def test_the_bubble_is_the_published_one(self):
        # Narayanan et al. 2021: (p - 1) / m of the ideal time, here as a part of the whole.
        degrees = Degrees(tp=1, cp=1, dp=1, pp=4, vpp=1, ep=1, etp=1, edp=1)
        assert bubble_fraction(degrees, 12) == pytest.approx((3 / 12) / (1 + 3 / 12))

    def test_the_vocabulary_of_bytes_is_the_tokenizers(self):
        config = tiny_config("model.vocab_size=null")
        assert with_vocabulary(config).model.vocab_size == (
            build_tokenizer(config.tokenizer).vocab_size
        )

    def test_a_full_pipeline_repeats_itself(self):
        config = tiny_config(
            "model.pipeline_model_parallel_size=4",
            "model.num_layers=8",
            "model.virtual_pipeline_model_parallel_size=2",
            "train.global_batch_size=128",
            "train.micro_batch_size=1",
        ).finalize(4)
        degrees = Degrees.from_config(config)
        for stage in range(4):
            chunks = [
                chunk_activations(config, degrees, pp_rank=stage, chunk=c, spec="te", device="cuda")
                for c in range(2)
            ]
            few, many = (
                activation_peak(chunks, passes(degrees, pp_rank=stage, num_microbatches=n))
                for n in (16, 128)
            )
            assert few == many

    def test_full_recomputation_keeps_less_and_tensor_parallelism_divides(self):
        full = [
            "recompute.recompute_granularity=full",
            "recompute.recompute_method=uniform",
            "recompute.recompute_num_layers=1",
        ]
        whole = plan(tiny_config(*LLAMA_70B, *LAID_OUT, *full), world_size=64)
        kept = plan(tiny_config(*LLAMA_70B, *LAID_OUT), world_size=64)
        assert whole.rank(0).activation_bytes < kept.rank(0).activation_bytes / 5

    @pytest.mark.parametrize(
        ("overrides", "field"),
        [
            (["peft.type=lora"], "peft"),
            (["model.megatron={softmax_type: learnable}"], r"model\.megatron\.softmax_type"),
        ],
    )  # fmt: skip
    def test_refuses_what_it_does_not_model(self, overrides, field):
        with pytest.raises(ConfigError, match=field):
            plan(tiny_config(*overrides), world_size=1)

    def test_low_precision_adds_copies_of_weights_unless_parameters_are_kept_in_it(self):
        plain, copied, kept = (
            plan(
                tiny_config(f"mixed_precision={name}", "dist.device=auto"),
                world_size=1,
                gpu="h100-80gb",
            )
            for name in (
                "bf16_mixed",
                "bf16_with_fp8_subchannel_scaling_mixed",
                "bf16_with_fp8_current_scaling_mixed",
            )
        )
        # Four layers: attention 64 x (64 + 128), MLP 64 x 128 x 3, two bytes an element.
        assert copied.rank(0).extra_bytes == 4 * 64 * (64 + 128 + 3 * 128) * 2
        assert plain.rank(0).extra_bytes == kept.rank(0).extra_bytes == 0
        assert not plain.notes
        assert "FP8" in copied.notes[0]

    def test_the_offloaded_part_of_the_optimizer_is_not_on_the_gpu(self):
        offload = ["offload.optimizer_cpu_offload=true", "offload.optimizer_offload_fraction=0.75"]
        base = ["dist.device=auto", "mixed_precision=bf16_mixed"]
        base += ["optimizer.use_distributed_optimizer=true", "optimizer.overlap_param_gather=false"]
        whole = plan(tiny_config(*base), world_size=1, gpu="h100-80gb")
        part = plan(tiny_config(*base, *offload), world_size=1, gpu="h100-80gb")
        everything = whole.rank(0).state.optimizer_bytes
        assert part.rank(0).state.optimizer_bytes == everything / 4
        assert "optimizer offload" in part.notes[0]

    def test_sharded_parameters_leave_room_for_the_layers_that_are_gathered(self):
        fsdp = ["ddp.use_megatron_fsdp=true"]
        kept = plan(
            tiny_config(*fsdp, "ddp.data_parallel_sharding_strategy=optim_grads"), world_size=2
        )
        sharded = plan(tiny_config(*fsdp), world_size=2)
        parts = sum(sharded.rank(rank).state.parameters for rank in (0, 1))
        assert parts == kept.rank(0).state.parameters
        assert sharded.rank(0).working_bytes > kept.rank(0).working_bytes

    def test_asks_for_a_vocabulary_that_only_files_tell(self):
        config = tiny_config(
            "model.vocab_size=null",
            "tokenizer.tokenizer_type=huggingface",
            "tokenizer.tokenizer_model=nowhere",
        )
        with pytest.raises(ConfigError, match=r"model\.vocab_size"):
            plan(config, world_size=1)

    def test_names_the_gpus_it_knows(self):
        with pytest.raises(EngineError, match="h100-80gb"):
            plan(tiny_config(), world_size=1, gpu="h1000")
        assert {round(gpu.memory_bytes / 1e9, -1) for gpu in GPUS.values()} >= {40, 90, 150, 190}

    def test_says_which_ranks_there_are(self):
        with pytest.raises(LookupError, match="ranks 0 to 0"):
            plan(tiny_config(), world_size=1).rank(1)


class TestSearch:
    def test_what_is_found_is_accepted_and_fits(self, found):
        for candidate in found:
            made = plan(
                tiny_config(*LLAMA_70B, *candidate.overrides), world_size=64, gpu="h100-80gb"
            )
            assert made.fits
            assert made.degrees == candidate.plan.degrees
            assert made.peak_bytes == pytest.approx(candidate.plan.peak_bytes)

    def test_the_fastest_comes_first_and_parts_add_up(self, found):
        totals = [candidate.time.total_s for candidate in found]
        assert totals == sorted(totals)
        time = found[0].time
        parts = (
            time.compute_s, time.recompute_s, time.tensor_s, time.context_s, time.expert_s,
            time.pipeline_s, time.bubble_s, time.data_s, time.optimizer_s,
        )  # fmt: skip
        assert sum(parts) == pytest.approx(time.total_s)
        assert 0.2 < time.model_flops_utilization < 0.65

    def test_nothing_faster_is_left_out(self):
        overrides = [*LLAMA_70B, "model.num_layers=8", "model.seq_length=4096"]
        config = tiny_config(*overrides)
        gpu = gpu_named("h100-80gb")
        best = search(config, gpus=8, gpu=gpu, keep=1)[0]
        plain = _on_one_replica(config, 8)
        everything = [
            candidate
            for layout in layouts(plain, 8, gpu)
            for rows in (1, 2, 4, 8)
            if (candidate := _least_recomputed(plain, layout, rows, gpu, {})) is not None
        ]
        assert best.time.total_s == min(c.time.total_s for c in everything)

    def test_overrides_replace_the_layout_of_the_configuration(self):
        config = tiny_config(
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=true",
            "recompute.recompute_granularity=selective",
            "optimizer.use_distributed_optimizer=true",
            "ddp.overlap_grad_reduce=true",
        )
        for candidate in search(config, gpus=4, gpu="a100-40gb"):
            made = plan(config.override(*candidate.overrides), world_size=4, gpu="a100-40gb")
            assert made.degrees == candidate.plan.degrees
            assert made.peak_bytes == pytest.approx(candidate.plan.peak_bytes)
        alone = search(config, gpus=1, gpu="a100-40gb")[0]
        made = plan(config.override(*alone.overrides), world_size=1, gpu="a100-40gb")
        assert made.peak_bytes == pytest.approx(alone.plan.peak_bytes)

    def test_finds_expert_parallelism(self):
        best = search(tiny_config(*MIXTRAL), gpus=16, gpu="h100-80gb", keep=1)[0]
        assert best.plan.degrees.ep > 1
        assert best.time.expert_s > 0

    def test_says_when_nothing_fits(self):
        with pytest.raises(EngineError, match="no layout of this model fits a100-40gb"):
            search(tiny_config(*LLAMA_70B), gpus=8, gpu="a100-40gb")

    def test_takes_little_time(self):
        # Processor time, as other processes may hold this one up; 3 s where it was measured.
        start = time.process_time()
        search(tiny_config(*LLAMA_70B), gpus=64, gpu="h100-80gb")
        assert time.process_time() - start < 10


class TestCommand:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(tiny_config().to_yaml(), encoding="utf-8")
        return str(path)

    def test_prints_stages_and_what_is_sent(self, file, capsys):
        overrides = ["model.pipeline_model_parallel_size=2", "train.global_batch_size=16"]
        assert main(["plan", file, *overrides, "--world-size", "2", "--gpu", "a100-40gb"]) == 0
        text = capsys.readouterr().out
        assert "2 ranks: PP2; te layers on cuda" in text
        assert "pp_p2p" in text
        assert "bubble 11.1%" in text
        assert "fits: " in text

    def test_prints_json(self, file, capsys):
        assert main(["plan", file, "--world-size", "2", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["device"] == "cpu"
        assert data["groups"][0]["ranks"] == [0, 1]
        assert data["groups"][0]["sent_bytes"].keys() == {"dp_gradient_all_reduce"}
        sizes = data["groups"][0]["bytes"]
        assert sizes["peak"] == sum(size for name, size in sizes.items() if name != "peak")

    def test_prints_layouts(self, file, capsys):
        search_for = ["--search", "--gpus", "4", "--gpu", "h200-141gb", "--keep", "2"]
        assert main(["plan", file, *search_for]) == 0
        text = capsys.readouterr().out
        assert "4 x h200-141gb" in text
        assert "bubble s" in text
        assert main(["plan", file, *search_for, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--world-size", "3", "model.tensor_model_parallel_size=2"], "world size 3"),
            (["--world-size", "1", "--gpu", "tpu"], "gpu=tpu"),
            (["--world-size", "1", "--search"], "--gpu"),
            (["--gpus", "1", "--search", "--gpu", "a100-40gb", "--keep", "0"], "--keep=0"),
        ],
    )
    def test_errors_are_one_line_and_two(self, file, arguments, message, capsys):
        first = [a for a in arguments if "=" in a and not a.startswith("-")]
        flags = [a for a in arguments if a not in first]
        assert main(["plan", file, *first, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1

    def test_neither_torch_nor_megatron_is_imported(self, file):
        script = (
            "import sys\n"
            "from mb_engine.cli import main\n"
            "code = main(sys.argv[1:])\n"
            "heavy = {'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else code)\n"
        )
        arguments = ["plan", file, "--world-size", "2", "--gpu", "b200-192gb"]
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
