# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk, with Hugging Face PEFT as the oracle for both directions."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from mb_config import LoRA
from mb_peft import (
    PeftError,
    TorchLinears,
    adapters,
    inject,
    load_hf_adapter,
    merge,
    remove,
    save_hf_adapter,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).double()


@pytest.fixture
def llama(base):
    return copy.deepcopy(base)


@pytest.fixture
def tokens():
    return torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def randomize(parameters, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)


def with_ours(model, **options):
    options = {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj", "v_proj"]} | options
    inject(model, LoRA(**options))
    randomize(p for p in model.parameters() if p.requires_grad)
    return model


def with_theirs(model, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=False)
    randomize(p for p in model.parameters() if p.requires_grad)
    return model.eval()


def open_with_peft(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(
            model, folder, autocast_adapter_dtype=False, **options
        ).eval()


class TestOurs:
    def test_opens_in_peft_with_the_same_outputs(self, base, llama, tokens, tmp_path):
        save_hf_adapter(with_ours(llama), tmp_path)
        theirs = open_with_peft(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close(theirs(tokens).logits, llama(tokens).logits, rtol=0, atol=1e-12)
        assert not torch.allclose(base(tokens).logits, llama(tokens).logits)

    def test_has_the_gradients_of_peft(self, base, llama, tokens, tmp_path):
        save_hf_adapter(with_ours(llama), tmp_path)
        theirs = open_with_peft(copy.deepcopy(base), tmp_path, is_trainable=True)
        for model in (llama, theirs):
            model(tokens, labels=tokens).loss.backward()
        want = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        got = {n: p.grad for n, p in llama.named_parameters() if p.grad is not None}
        assert len(got) == len(want) == 8
        for name, grad in got.items():
            theirs_name = name.replace(".lora_a.", ".lora_A.default.")
            theirs_name = theirs_name.replace(".lora_b.", ".lora_B.default.")
            torch.testing.assert_close(
                grad, want[f"base_model.model.{theirs_name}"], rtol=1e-10, atol=1e-13
            )

    def test_merged_equals_peft_merged(self, base, llama, tokens, tmp_path):
        save_hf_adapter(with_ours(llama), tmp_path)
        theirs = open_with_peft(copy.deepcopy(base), tmp_path).merge_and_unload()
        merge(llama)
        remove(llama)
        assert list(theirs.state_dict()) == list(llama.state_dict())
        for name, value in llama.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-14)

    @pytest.mark.parametrize(
        ("targets", "written"),
        [
            (["*_proj"], 7),
            (["layers.1.self_attn.q_proj"], "model\\.layers\\.1\\.self_attn\\.q_proj"),
            (["lm_head", "layers.0.mlp.*"], None),
        ],
    )
    def test_names_exactly_the_adapted_modules(self, base, llama, tmp_path, targets, written):
        save_hf_adapter(with_ours(llama, target_modules=targets), tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        names = config["target_modules"]
        assert written in {None, len(names), str(names)}
        theirs = open_with_peft(copy.deepcopy(base), tmp_path)
        found = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
        assert found == set(adapters(llama))

    def test_comes_back_into_a_plain_model(self, base, llama, tokens, tmp_path):
        save_hf_adapter(with_ours(llama, dropout=0.1).eval(), tmp_path)
        fresh = copy.deepcopy(base).eval()
        lora = load_hf_adapter(fresh, tmp_path)
        assert (lora.rank, lora.alpha, lora.dropout) == (4, 6.0, 0.1)
        assert torch.equal(fresh(tokens).logits, llama(tokens).logits)
        trainable = {n for n, p in fresh.named_parameters() if p.requires_grad}
        assert trainable == {n for n, p in llama.named_parameters() if p.requires_grad}

    def test_comes_back_into_a_model_with_the_same_adapters(self, llama, tokens, tmp_path):
        save_hf_adapter(with_ours(llama), tmp_path)
        before = llama(tokens).logits
        randomize((p for p in llama.parameters() if p.requires_grad), seed=9)
        assert not torch.allclose(llama(tokens).logits, before)
        load_hf_adapter(llama, tmp_path)
        assert torch.equal(llama(tokens).logits, before)

    def test_keeps_its_dtype_on_disk(self, llama, tmp_path):
        inject(llama, LoRA(), targets=["q_proj"], factory=TorchLinears(dtype=torch.bfloat16))
        save_hf_adapter(llama, tmp_path / "a" / "b")
        tensors = load_file(tmp_path / "a" / "b" / "adapter_model.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}

    def test_a_fraction_as_alpha_survives(self, base, llama, tmp_path):
        save_hf_adapter(with_ours(llama, alpha=6.5), tmp_path, base_model="me/base")
        config = peft.LoraConfig.from_pretrained(tmp_path)
        assert (config.lora_alpha, config.base_model_name_or_path) == (6.5, "me/base")
        assert load_hf_adapter(copy.deepcopy(base), tmp_path).alpha == 6.5


class TestTheirs:
    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}])
    def test_opens_here_with_the_same_outputs(self, base, llama, tokens, tmp_path, options):
        theirs = with_theirs(llama, **options)
        theirs.save_pretrained(tmp_path)
        ours = copy.deepcopy(base).eval()
        load_hf_adapter(ours, tmp_path)
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_dora": True}, r"is not the weight of a LoRA adapter|use_dora=True is not"),
            ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern=\{'q_proj': 2\} is not supported"),
            ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern=.* is not supported"),
            ({"modules_to_save": ["lm_head"]}, "is not the weight of a LoRA adapter of a linear"),
            ({"target_modules": ["embed_tokens"]}, "is not the weight of a LoRA adapter"),
        ],
    )
    def test_what_would_compute_something_else_is_refused(self, base, tmp_path, options, message):
        theirs = with_theirs(copy.deepcopy(base), **options)
        theirs.save_pretrained(tmp_path, save_embedding_layers=False)
        ours = copy.deepcopy(base)
        with pytest.raises(PeftError, match=message):
            load_hf_adapter(ours, tmp_path)
        assert not adapters(ours)
        assert all(p.requires_grad for p in ours.parameters())


class TestRefusals:
    @pytest.fixture
    def saved(self, llama, tmp_path):
        save_hf_adapter(with_ours(llama), tmp_path)
        return tmp_path

    def change(self, folder, **fields):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    def test_no_adapters_to_save(self, base, tmp_path):
        with pytest.raises(PeftError, match=r"no adapters; put them in with one inject"):
            save_hf_adapter(base, tmp_path)

    def test_missing_weights(self, base, tmp_path):
        with pytest.raises(PeftError, match=r"adapter_model\.safetensors: no such file; save"):
            load_hf_adapter(base, tmp_path)

    def test_missing_configuration(self, base, saved):
        (saved / "adapter_config.json").unlink()
        with pytest.raises(PeftError, match=r"adapter_config\.json: no such file"):
            load_hf_adapter(base, saved)

    @pytest.mark.parametrize("text", ["{", "[]", "{}"])
    def test_a_broken_configuration(self, base, saved, text):
        (saved / "adapter_config.json").write_text(text)
        with pytest.raises(PeftError, match="not the configuration of an adapter"):
            load_hf_adapter(base, saved)

    def test_broken_weights(self, base, saved):
        (saved / "adapter_model.safetensors").write_bytes(b"nothing")
        with pytest.raises(PeftError, match="cannot be read"):
            load_hf_adapter(base, saved)

    def test_another_method(self, base, saved):
        self.change(saved, peft_type="IA3")
        with pytest.raises(PeftError, match="peft_type=IA3: only LORA can be read"):
            load_hf_adapter(base, saved)

    def test_trained_biases(self, base, saved):
        self.change(saved, bias="all")
        with pytest.raises(PeftError, match="bias='all': only 'none' is supported"):
            load_hf_adapter(base, saved)

    def test_half_an_adapter(self, base, saved):
        file = saved / "adapter_model.safetensors"
        tensors = load_file(file)
        gone = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        save_file({k: v for k, v in tensors.items() if k != gone}, file)
        with pytest.raises(PeftError, match=r"q_proj\.lora_B\.weight is missing"):
            load_hf_adapter(base, saved)

    def test_a_model_without_such_a_module(self, saved):
        with pytest.raises(PeftError, match="the model has no such module"):
            load_hf_adapter(nn.Sequential(nn.Linear(2, 2)), saved)

    def test_another_width(self, saved):
        config = LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4,
        )  # fmt: skip
        other = LlamaForCausalLM(config)
        with pytest.raises(
            PeftError, match=r"lora_A has shape \[4, 16\], the model needs \[4, 32\]"
        ):
            load_hf_adapter(other, saved)
        assert not adapters(other)

    def test_other_modules_adapted_already(self, base, saved):
        other = with_ours(copy.deepcopy(base), target_modules=["q_proj", "v_proj", "o_proj"])
        with pytest.raises(PeftError, match=r"only the model adapts .*o_proj; remove\(model\)"):
            load_hf_adapter(other, saved)

    def test_another_scale_than_that_of_the_model(self, base, saved):
        other = with_ours(copy.deepcopy(base), alpha=12)
        with pytest.raises(PeftError, match=r"alpha/rank is 1\.5 and 3 in the model at"):
            load_hf_adapter(other, saved)
