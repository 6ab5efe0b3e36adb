# SPDX-License-Identifier: Apache-2.0
"""Folders that are damaged or do not fit, each with one clear error; runs that start from a folder."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from mb_engine.bridge import (
    BridgeError,
    HubFormatError,
    MappingError,
    UnknownFamilyError,
    config_from_hf,
    export_hf,
    import_hf,
)
from mb_engine.bridge.hub_format import open_tensors
from mb_engine.bridge.hub_writer import HubWriter, Planned
from mb_engine.cli import main

safetensors = pytest.importorskip("safetensors.torch")

HEAD, HEADS, GROUPS, FFN, VOCAB, LAYERS = 16, 2, 1, 48, 60, 2
HIDDEN = HEAD * HEADS
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "dtype": "float32",
}


def tensors():
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (HIDDEN,),
            p + "post_attention_layernorm.weight": (HIDDEN,),
            p + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            p + "self_attn.k_proj.weight": (GROUPS * HEAD, HIDDEN),
            p + "self_attn.v_proj.weight": (GROUPS * HEAD, HIDDEN),
            p + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            p + "mlp.gate_proj.weight": (FFN, HIDDEN),
            p + "mlp.up_proj.weight": (FFN, HIDDEN),
            p + "mlp.down_proj.weight": (HIDDEN, FFN),
        }
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder, values, config=CONFIG, *, files=1):
    folder.mkdir(exist_ok=True)
    names = list(values)
    weight_map = {}
    for i in range(files):
        file = (
            "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        )
        part = {name: values[name] for name in names[i::files]}
        safetensors.save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", tensors(), files=2)


def refuses(folder, error, match):
    with pytest.raises(error, match=match) as caught:
        import_hf(folder, folder.parent / "checkpoint")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_truncated_file_is_named(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refuses(folder, HubFormatError, r"00002-of-00002\.safetensors: has \d+ bytes.*truncated")


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs", b"\x05" + b"\0" * 7 + b"abcde"]
)
def test_a_file_that_is_no_safetensors_file_is_named(folder, content):
    (folder / "model-00001-of-00002.safetensors").write_bytes(content)
    refuses(folder, HubFormatError, r"00001-of-00002\.safetensors: .*header.*get it anew")


def test_offsets_that_do_not_fit_shapes_are_refused(folder):
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[60,32]', b'"shape":[61,32]', 1))
    refuses(folder, HubFormatError, r"of shape \[61, 32\] .* the header is damaged")


def test_a_missing_file_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuses(folder, HubFormatError, r"not there: model-00002-of-00002\.safetensors")


def test_an_index_that_does_not_say_what_files_hold_is_refused(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    said = refuses(folder, HubFormatError, r"does not say what the files hold")
    assert "'lm_head.weight' is in model-00001" in said
    assert "'model.norm.weight' of model-00002-of-00002.safetensors is left out" in said
    assert "'ghost' is in no file" in said


def test_an_index_that_is_no_index_is_named(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    refuses(folder, HubFormatError, r"index\.json: is no index")


def test_no_weights_and_no_config_are_said(folder):
    for file in folder.glob("model*"):
        file.unlink()
    refuses(folder, HubFormatError, r"holds neither model\.safetensors nor")
    (folder / "config.json").write_text("[")
    refuses(folder, HubFormatError, r"config\.json: is no JSON")
    (folder / "config.json").unlink()
    refuses(folder, HubFormatError, r"config\.json: is not there")


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    values = tensors()
    values["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(HIDDEN)
    values["vision.patch"] = torch.zeros(3)
    del values["model.layers.1.mlp.up_proj.weight"], values["model.norm.weight"]
    values["lm_head.weight"] = torch.zeros(VOCAB + 1, HIDDEN)
    said = refuses(write(tmp_path / "model", values), MappingError, "does not fit its config.json")
    no_rule, missing, shape = re.split(r"tensors (?:that are not there|of another shape): ", said)
    assert "q_proj.bias" in no_rule
    assert "vision.patch" in no_rule
    assert "model.layers.1.mlp.up_proj.weight" in missing
    assert "model.norm.weight" in missing
    assert "lm_head.weight is [61, 32], config.json makes it [60, 32]" in shape


def test_an_unknown_architecture_names_those_there_are_and_how_to_add_one(folder):
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"architectures": ["FalconForCausalLM"]})
    )
    said = refuses(folder, UnknownFamilyError, "no mapping for architecture FalconForCausalLM")
    assert "gemma, gemma2, gemma3, llama, mistral" in said
    assert "docs/adding-a-model-family.md" in said


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling of type 'yarn'"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"mlp_bias": True}, "mlp_bias without attention_bias"),
        ({"rope_theta": 10000.5}, "rope_theta=10000.5 is no whole number"),
    ],
)
def test_what_our_model_cannot_do_is_refused(folder, entry, match):
    (folder / "config.json").write_text(json.dumps(CONFIG | entry))
    refuses(folder, MappingError, match)


def test_a_missing_entry_of_the_config_is_named(folder):
    config = {k: v for k, v in CONFIG.items() if k != "hidden_size"}
    (folder / "config.json").write_text(json.dumps(config))
    refuses(folder, MappingError, "hidden_size is missing")


def test_a_tied_output_on_disk_must_repeat_the_embedding_and_comes_back(tmp_path):
    values = tensors()
    config = CONFIG | {"tie_word_embeddings": True}
    source = write(tmp_path / "model", values, config)
    refuses(source, MappingError, "lm_head.weight differs from model.embed_tokens.weight")
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(HEAD // 2)
    write(source, values, config)
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "made")
    back = safetensors.load_file(tmp_path / "made" / "model.safetensors")
    assert back.keys() == values.keys()
    assert all(torch.equal(back[name], value) for name, value in values.items())


def test_dtypes_of_single_tensors_come_back(tmp_path):
    values = {n: v.bfloat16() if v.dim() > 1 else v for n, v in tensors().items()}
    source = write(tmp_path / "model", values, CONFIG)
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "made")
    name = "model.safetensors"
    assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()


def test_a_writer_refuses_to_finish_what_is_not_whole(tmp_path):
    plan = [
        Planned(name="a", dtype="F32", shape=(4, 2)),
        Planned(name="b", dtype="F32", shape=(1,)),
    ]
    with HubWriter(tmp_path, plan) as writer:
        writer.write_rows("a", 0, torch.zeros(3, 2))
        with pytest.raises(MappingError, match="fills a; b"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_files_are_those_that_safetensors_reads_and_writes(tmp_path):
    values = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(3, dtype=torch.bfloat16)}
    plan = [
        Planned(name="x", dtype="F32", shape=(2, 3)),
        Planned(name="y", dtype="BF16", shape=(3,)),
    ]
    with HubWriter(tmp_path, plan) as writer:
        for name, value in values.items():
            writer.write_rows(name, 0, value)
        writer.finish()
    safetensors.save_file(values, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    file = tmp_path / "model.safetensors"
    assert file.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert torch.equal(open_tensors(tmp_path).read("y"), values["y"])


def run_settings(folder, out):
    return config_from_hf(folder).override(
        "model.seq_length=16",
        "tokenizer.tokenizer_type='null'",
        "tokenizer.tokenizer_model=null",
        f"tokenizer.vocab_size={VOCAB}",
        "dataset.type=mock",
        "train.train_iters=2",
        "train.global_batch_size=2",
        "dist.device=cpu",
        "validation.eval_at_end=false",
        f"checkpoint.save={out / 'run'}",
        f"checkpoint.save_hf={out / 'hf'}",
        "checkpoint.save_interval=1",
        "logger.sinks=[]",
    )


def start(folder, out):
    from mb_engine.train.entry import finetune

    finetune(run_settings(folder, out))


def test_a_run_starts_from_a_folder_and_saves_folders(folder, tmp_path):
    from mb_engine.testing import run_ranks

    text = folder / "tokenizer_config.json"
    text.write_text('{"kept": true}')
    values = tensors()
    run_ranks(start, 1, folder, tmp_path)
    before = open_tensors(folder)
    shutil.copytree(folder, tmp_path / "kept")
    shutil.rmtree(folder)
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["step_00000001", "step_00000002"]
    export_hf(tmp_path / "run", tmp_path / "made")
    last = tmp_path / "hf" / "step_00000002"
    assert {p.name for p in last.iterdir()} == {p.name for p in (tmp_path / "kept").iterdir()}
    for path in last.iterdir():
        assert path.read_bytes() == (tmp_path / "made" / path.name).read_bytes(), path.name
    name = "model.layers.0.mlp.up_proj.weight"
    trained = open_tensors(last).read(name)
    assert not torch.equal(trained, values[name])
    # Adam's first two steps move a weight by at most the learning rate each.
    assert float((trained - values[name]).abs().max()) < 2.1 * 3e-4
    assert before.entries.keys() == open_tensors(last).entries.keys()


def test_no_run_is_resumed_from_a_folder(folder, tmp_path):
    from mb_engine import compose
    from mb_engine.errors import EngineError

    config = run_settings(folder, tmp_path).override(f"checkpoint.load={folder}")
    with pytest.raises(EngineError, match=r"give it as checkpoint\.pretrained_checkpoint"):
        compose.hub_folder_of(config)


def test_the_command_converts_both_ways(folder, tmp_path, capsys):
    checkpoint, made = str(tmp_path / "checkpoint"), tmp_path / "made"
    assert main(["convert", "import", str(folder), checkpoint]) == 0
    assert main(["convert", "export", checkpoint, str(made), "--step", "0"]) == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (made / path.name).read_bytes()
    assert main(["convert", "export", checkpoint, str(made), "--step", "7"]) == 2
    assert "holds no complete step 7; there are 0" in capsys.readouterr().err
    assert main(["convert", "config", str(folder)]) == 0
    assert "num_layers: 2" in capsys.readouterr().out
    assert main(["convert", "config", str(folder), "there"]) == 2
    assert "convert config: takes no target" in capsys.readouterr().err
    assert main(["convert", "import", str(folder), checkpoint, "--dtype=float16"]) == 2
    assert "--dtype: is for convert export" in capsys.readouterr().err


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    with pytest.raises(BridgeError, match="holds no complete step; there are none"):
        export_hf(tmp_path, tmp_path / "made")
