# SPDX-License-Identifier: Apache-2.0
"""Every family computes what ``transformers`` computes, in any layout, and comes back as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mb_engine.testing import run_ranks

VOCAB, LENGTH = 125, 32  # a vocabulary that is padded to 128
TOLERANCE = 2e-4  # of the largest logit: float32 sums in another order, over a few layers

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_experts": 4}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 8}
CASES = {
    "llama": ("Llama", {"head_dim": 24}),
    "llama tied, stretched": (
        "Llama",
        {"tie_word_embeddings": True, "rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    ),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with biases in attention": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 24}),
    "gemma2": (
        "Gemma2",
        GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3Text",
        GEMMA
        | {
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        EXPERTS | {"shared_expert_intermediate_size": 32, "norm_topk_prob": False},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        EXPERTS | {"mlp_only_layers": [1], "norm_topk_prob": True, "head_dim": 16},
    ),
    "qwen3_moe fused": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True, "head_dim": 16}),
}
SAVED = ("llama tied, stretched", "gemma3", "qwen2_moe")
LAYOUTS = {
    "TP1": [],
    "TP2": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "PP2": ["model.pipeline_model_parallel_size=2"],
    "EP2": ["model.expert_model_parallel_size=2"],
}
VPP = ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"]
CP2 = ["model.context_parallel_size=2"]
FURTHER = {
    "llama": {"PP2 VPP2": VPP, "CP2": CP2, "TP2 CP2": LAYOUTS["TP2"] + CP2},
    "qwen3_moe": {"PP2 VPP2": VPP, "CP2": CP2, "TP2 EP2": LAYOUTS["TP2"] + LAYOUTS["EP2"]},
}
"""Of one dense family and one with experts, on four ranks."""


def make(case, folder):
    """Write a model with every tensor random, and return its logits."""
    import transformers

    kind, settings = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    name = kind.removesuffix("Text") + "ForCausalLM"
    torch.manual_seed(len(case))
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=0.08)
        logits = model(tokens()).logits.clone()
    model.save_pretrained(folder, max_shard_size="100KB")
    if "fused" in case:
        fuse_experts(folder)
    (folder / "tokenizer_config.json").write_text('{"made": "up"}')
    torch.save(logits, folder / "logits.pt")


def fuse_experts(folder):
    """Put the experts of each layer into tensors of three dimensions, in one file."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    for layer in range(SIZES["num_hidden_layers"]):
        block = f"model.layers.{layer}.mlp.experts."
        each = [
            {x: tensors.pop(f"{block}{e}.{x}_proj.weight") for x in ("gate", "up", "down")}
            for e in range(4)
        ]
        gate_up = [torch.cat((one["gate"], one["up"])) for one in each]
        tensors[block + "gate_up_proj"] = torch.stack(gate_up)
        tensors[block + "down_proj"] = torch.stack([one["down"] for one in each])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tokens():
    return torch.arange(2 * LENGTH).view(2, LENGTH) * 37 % VOCAB


def whole_logits(engine):
    """Return the logits of all tokens on every rank."""
    from mb_engine.train import generate

    rows = []
    for row in tokens().tolist():
        for last in (7, LENGTH - 1):
            rows.append(generate._last_logits(engine.runner, row[: last + 1], LENGTH)[:VOCAB])
    return torch.stack(rows)


def own_logits(engine):
    """Return the logits of the tokens that this rank works on, and which they are."""
    from mb_engine.parallel.sequence import context_parallel_slice
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    rows = {"tokens": tokens(), "place": torch.arange(LENGTH).expand(2, LENGTH)}
    layout = engine.layout
    own = context_parallel_slice(rows, cp=layout.cp, cp_rank=layout.cp_rank)
    logits = engine.model[0](own["tokens"], own["place"], None)
    return gather_from_tensor_model_parallel_region(logits)[..., :VOCAB], own["place"][0]


def settings_of(folder, layout):
    from mb_engine.bridge import config_from_hf

    return config_from_hf(folder).override(
        "dataset.type=mock",
        "tokenizer.tokenizer_type=bytes",
        "tokenizer.tokenizer_model=null",
        f"model.seq_length={LENGTH}",
        "train.train_iters=1",
        "train.global_batch_size=4",
        "dist.device=cpu",
        *layout,
    )


def import_and_export(root, names):
    """Import each case in each layout; return the worst errors, and write each back."""
    from mb_engine import compose
    from mb_engine.bridge import export_model, load_hf
    from mb_engine.train.engine import Engine

    worst = {}
    for case, layouts in names.items():
        folder = Path(root) / case
        expected = torch.load(folder / "logits.pt")[:, (7, LENGTH - 1)].flatten(0, 1)
        for layout in layouts:
            save = Path(root) / f"{case} checkpoint of {layout}"
            changes = [f"checkpoint.save={save}", "checkpoint.save_optim=false"]
            engine = Engine.from_config(settings_of(folder, [*LAYOUTS[layout], *changes]))
            try:
                load_hf(engine, folder)
                with engine.eval_mode():
                    found = whole_logits(engine)
                export_model(engine, Path(root) / f"{case} from {layout}")
                if case in SAVED:
                    own, _ = compose.checkpointers_of(engine.config, engine.layout)
                    engine.save(own).result()
                    own.close()
            finally:
                engine.close()
            worst[case, layout] = float((found - expected).abs().max() / expected.abs().max())
    return worst


def import_further(root):
    """Import into the further layouts; return how far this rank's logits are off."""
    from mb_engine.bridge import load_hf
    from mb_engine.train.engine import Engine

    errors = {}
    for case, layouts in FURTHER.items():
        folder = Path(root) / case
        expected = torch.load(folder / "logits.pt")
        for name, layout in layouts.items():
            engine = Engine.from_config(settings_of(folder, layout))
            try:
                load_hf(engine, folder)
                with engine.eval_mode():
                    if engine.layout.cp > 1:
                        found, places = own_logits(engine)
                        wanted = expected[:, places]
                    else:
                        found = whole_logits(engine)
                        wanted = expected[:, (7, LENGTH - 1)].flatten(0, 1)
            finally:
                engine.close()
            errors[case, name] = float((found - wanted).abs().max() / expected.abs().max())
    return errors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    for case in CASES:
        make(case, root / case)
    return root


@pytest.fixture(scope="module")
def imported(models):
    layouts = {
        case: [
            x
            for x in LAYOUTS
            if x != "EP2"
            or "num_experts_per_tok" in str(CASES[case][1])
            or "num_local_experts" in CASES[case][1]
        ]
        for case in CASES
    }
    results = run_ranks(import_and_export, 2, str(models), layouts, timeout_s=300)
    assert results[0].keys() == results[1].keys()
    return results[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_in_every_layout(case, imported):
    errors = {layout: error for (name, layout), error in imported.items() if name == case}
    assert {"TP1", "TP2", "PP2"} <= errors.keys()
    assert max(errors.values()) < TOLERANCE, errors


def test_logits_are_those_of_transformers_in_further_layouts(models):
    ranks = run_ranks(import_further, 4, str(models), timeout_s=300)
    worst = {key: max(errors[key] for errors in ranks) for key in ranks[0]}
    assert len(worst) == 6
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("case", CASES)
def test_a_folder_comes_back_to_the_byte_from_every_layout(case, models, imported):
    for name, layout in imported:
        if name == case:
            assert_same_files(models / case, models / f"{case} from {layout}")


def assert_same_files(there, here):
    names = sorted(path.name for path in there.iterdir() if path.suffix != ".pt")
    assert sorted(path.name for path in here.iterdir()) == names
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name


@pytest.mark.parametrize("case", SAVED)
def test_checkpoints_of_every_layout_are_exported(case, models, imported, tmp_path):
    from mb_engine.bridge import export_hf

    for name, layout in imported:
        if name == case:
            export_hf(models / f"{case} checkpoint of {layout}", tmp_path / layout)
            assert_same_files(models / case, tmp_path / layout)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_exported_without_the_source_folder(case, models, imported, tmp_path):
    from mb_engine.bridge import export_hf, import_hf

    copy = tmp_path / "source"
    shutil.copytree(models / case, copy)
    import_hf(copy, tmp_path / "checkpoint")
    shutil.rmtree(copy)
    export_hf(tmp_path / "checkpoint", tmp_path / "made")
    assert_same_files(models / case, tmp_path / "made")


@pytest.mark.parametrize("case", CASES)
def test_a_model_without_a_source_has_a_config_that_transformers_reads(case, models, tmp_path):
    import transformers
    from mb_engine.bridge import config_from_hf, config_to_hf

    model = settings_of(models / case, []).finalize(1).model
    family, written = config_to_hf(model)
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    original = transformers.AutoConfig.from_pretrained(models / case)
    again = config_from_hf(tmp_path).override(f"model.seq_length={LENGTH}")
    assert read.architectures == original.architectures == [family.architecture]
    resolved = again.override(
        "dataset.type=mock",
        "train.train_iters=1",
        "tokenizer.tokenizer_type=bytes",
        "tokenizer.tokenizer_model=null",
    )
    assert resolved.finalize(1).model.megatron == model.megatron
