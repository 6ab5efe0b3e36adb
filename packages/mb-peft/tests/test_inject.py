# SPDX-License-Identifier: Apache-2.0
"""Adapters in a model: outputs, gradients, what is frozen, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from mb_config import LoRA
from mb_config.errors import UserError
from mb_config.plugins import load
from mb_config.records import ProcessLayout
from mb_peft import PeftError, TorchLinears, adapters, disabled, inject, remove
from torch import nn

QV = ["*.q_proj", "*.v_proj"]


def randomize(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters(model).values():
        for weight in (layer.lora_a.weight, layer.lora_b.weight):
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) / 2)


class TestOutputs:
    def test_a_new_adapter_changes_nothing(self, model, ids):
        before = model(ids)
        inject(model, LoRA(rank=2), targets=QV)
        assert torch.equal(model(ids), before)

    @pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (2, 6.0), (4, 0.5)])
    def test_equal_the_formula_in_float64(self, rank, alpha):
        base = nn.Sequential(nn.Linear(5, 7).double())
        x = torch.randn(11, 5, dtype=torch.float64)
        weight, bias = base[0].weight.clone(), base[0].bias.clone()
        inject(base, LoRA(rank=rank, alpha=alpha), targets=["0"])
        randomize(base)
        a, b = base[0].lora_a.weight, base[0].lora_b.weight
        assert (a.shape, b.shape) == ((rank, 5), (7, rank))
        want = torch.einsum("oi,ti->to", weight, x) + bias
        want = want + alpha / rank * torch.einsum("or,ri,ti->to", b, a, x)
        torch.testing.assert_close(base(x), want, rtol=1e-13, atol=1e-13)

    def test_gradients_equal_those_of_the_formula(self):
        base = nn.Sequential(nn.Linear(5, 7).double())
        x = torch.randn(11, 5, dtype=torch.float64)
        weight, bias = base[0].weight.clone(), base[0].bias.clone()
        inject(base, LoRA(rank=2, alpha=6.0), targets=["0"])
        randomize(base)
        layer = base[0]
        a, b = (w.weight.detach().clone().requires_grad_() for w in (layer.lora_a, layer.lora_b))
        base(x).square().sum().backward()
        (x @ (weight + 3 * b @ a).T + bias).square().sum().backward()
        torch.testing.assert_close(layer.lora_a.weight.grad, a.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.lora_b.weight.grad, b.grad, rtol=1e-12, atol=1e-12)

    def test_only_adapters_get_gradients(self, model, ids):
        inject(model, LoRA(rank=2), targets=QV)
        randomize(model)
        model(ids).square().mean().backward()
        trained = {n for n, p in model.named_parameters() if p.grad is not None}
        want = {
            f"layers.{i}.{name}.lora_{half}.weight"
            for i in range(2)
            for name in ("q_proj", "v_proj")
            for half in "ab"
        }
        assert trained == want
        assert {n for n, p in model.named_parameters() if p.requires_grad} == want

    def test_training_lowers_a_loss(self, model, ids):
        inject(model, LoRA(rank=2, alpha=4), targets=QV)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(30):
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten().roll(1))
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]

    def test_adapters_of_another_dtype_give_the_output_its_own(self):
        base = nn.Sequential(nn.Linear(6, 4)).bfloat16()
        inject(base, LoRA(rank=2), targets=["0"], factory=TorchLinears(dtype=torch.float32))
        randomize(base)
        layer = base[0]
        x = torch.randn(3, 6).bfloat16()
        assert layer.lora_a.weight.dtype == torch.float32
        assert base(x).dtype == torch.bfloat16
        product = x.float() @ layer.lora_a.weight.T @ layer.lora_b.weight.T * layer.scale
        assert torch.equal(base(x), layer.base(x) + product.bfloat16())

    def test_works_under_autocast(self):
        base = nn.Sequential(nn.Linear(6, 4))
        inject(base, LoRA(rank=2), targets=["0"])
        randomize(base)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = base(torch.randn(3, 6))
        assert y.dtype == torch.bfloat16


class TestDropout:
    def make(self, position):
        model = nn.Sequential(nn.Linear(64, 48, bias=False))
        nn.init.zeros_(model[0].weight)
        inject(model, LoRA(rank=3, dropout=0.25, dropout_position=position), targets=["0"])
        randomize(model)
        return model

    def test_before_the_product_drops_inputs(self):
        model = self.make("pre")
        layer = model[0]
        nn.init.ones_(layer.lora_a.weight)
        nn.init.ones_(layer.lora_b.weight)
        with torch.no_grad():
            kept = model(torch.ones(400, 64)) / (layer.scale * 3) * 0.75
        torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
        assert torch.equal(kept, kept[:, :1].expand_as(kept))
        assert kept.std().item() == pytest.approx((64 * 0.75 * 0.25) ** 0.5, rel=0.15)
        assert kept.mean().item() == pytest.approx(64 * 0.75, rel=0.03)

    def test_after_the_product_drops_outputs(self):
        model = self.make("post")
        torch.manual_seed(0)
        x = torch.randn(400, 64)
        y = model(x)
        dropped = y == 0
        assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
        full = model.eval()(x)
        torch.testing.assert_close(y[~dropped], full[~dropped] / 0.75)

    def test_is_off_in_evaluation(self):
        model = self.make("pre").eval()
        x = torch.randn(5, 64)
        assert torch.equal(model(x), model(x))

    def test_follows_the_mode_of_the_model_it_enters(self, model):
        model.eval()
        inject(model, LoRA(dropout=0.5), targets=QV)
        assert not any(m.training for m in model.modules())


class TestReport:
    def test_counts_what_trains(self, model):
        report = inject(model, LoRA(rank=2), targets=QV)
        names = [row.name for row in report.adapted]
        assert names == [f"layers.{i}.{n}" for i in range(2) for n in ("q_proj", "v_proj")]
        assert report.trainable == 2 * (2 * (8 + 8) + 2 * (8 + 4)) == 112
        assert report.total == sum(p.numel() for p in model.parameters())

    def test_prints_layers_that_are_alike_in_one_row(self, model):
        lines = str(inject(model, LoRA(rank=2), targets=QV)).splitlines()
        assert lines[0].split() == ["module", "count", "out", "x", "in", "rank", "trainable"]
        assert lines[1].split() == ["layers.*.q_proj", "2", "8", "x", "8", "2", "64"]
        assert lines[2].split() == ["layers.*.v_proj", "2", "4", "x", "8", "2", "48"]
        assert lines[3].startswith("112 of ")


class TestTargets:
    @pytest.mark.parametrize(
        ("pattern", "count"),
        [
            ("q_proj", 2),
            ("layers.0.q_proj", 1),
            ("0.q_proj", 1),
            ("layers.*.q_proj", 2),
            ("*_proj", 6),
            ("[qv]_proj", 4),
            ("head", 1),
            ("*", 7),
            ("layers.1.*", 3),
        ],
    )
    def test_a_pattern_finds(self, model, pattern, count):
        assert len(inject(model, LoRA(), targets=[pattern]).adapted) == count

    def test_the_configuration_names_them_too(self, model):
        lora = LoRA(target_modules=["*_proj"], exclude_modules=["layers.1.*", "v_proj"])
        report = inject(model, lora)
        assert [r.name for r in report.adapted] == ["layers.0.q_proj", "layers.0.out_proj"]

    def test_a_module_at_two_places_is_adapted_once_at_both(self):
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
        report = inject(model, LoRA(rank=2), targets=["a", "b.0"])
        assert model["a"] is model["b"][0]
        assert len(report.adapted) == len(adapters(model)) == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("lora", "message"),
        [
            ({"target_modules": []}, "target_modules is empty: name at least one linear"),
            (
                {"target_modules": ["q_prj"]},
                r"'q_prj' matches no module of the model; near names: layers\.\*\.q_proj",
            ),
            (
                {"target_modules": ["*.linear_qkv", "q_proj"]},
                r"'\*\.linear_qkv' matches no module of the model",
            ),
            (
                {"target_modules": ["q_proj"], "exclude_modules": ["lm_head"]},
                "exclude_modules: 'lm_head' matches no module of the model; near names: head",
            ),
            (
                {"target_modules": ["q_proj"], "exclude_modules": ["layers.*"]},
                "exclude_modules leaves nothing of 'q_proj'",
            ),
            ({"target_modules": ["norm"]}, r"finds layers\.0\.norm, a LayerNorm, and no linear"),
            ({"target_modules": ["embed"]}, "finds embed, a Embedding, and no linear"),
            (
                {"target_modules": ["q_proj"], "lora_A_init_method": "zero"},
                "neither would ever get a gradient; set lora_A_init_method=xavier",
            ),
        ],
    )
    def test_what_cannot_be_done_is_said_and_changes_nothing(self, model, lora, message):
        before = [(n, p.requires_grad) for n, p in model.named_parameters()]
        with pytest.raises(PeftError, match=message) as caught:
            inject(model, LoRA(**lora))
        assert isinstance(caught.value, UserError)
        assert "\n" not in str(caught.value)
        assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before

    def test_a_second_injection(self, model):
        inject(model, LoRA(), targets=["q_proj"])
        with pytest.raises(PeftError, match=r"adapters already, the first at layers\.0\.q_proj"):
            inject(model, LoRA(), targets=["v_proj"])

    def test_the_projection_of_multihead_attention_which_bypasses_its_forward(self):
        model = nn.TransformerDecoderLayer(8, 2)
        with pytest.raises(PeftError, match=r"self_attn\.out_proj is the output projection of nn"):
            inject(model, LoRA(), targets=["out_proj"])
        report = inject(model, LoRA(exclude_modules=["out_proj"]), targets=["*"])
        assert [r.name for r in report.adapted] == ["linear1", "linear2"]

    def test_layers_with_a_fast_path_past_the_adapter_while_it_is_on(self):
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
        with pytest.raises(
            PeftError, match=r"0\.linear1 is in a nn\.TransformerEncoderLayer, whose"
        ):
            inject(model, LoRA(), targets=["linear1"])
        assert all(p.requires_grad for p in model.parameters())
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            inject(model, LoRA(rank=2), targets=["linear1"])
            x = torch.randn(1, 3, 8)
            with torch.no_grad():
                before = model(x)
                randomize(model)
                assert not torch.allclose(model(x), before)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    def test_packed_weights(self):
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(PeftError, match=r"0 holds a packed torch\.uint8 weight .* unquantized"):
            inject(model, LoRA(), targets=["0"])

    @pytest.mark.parametrize(
        "package", ["megatron.core.tensor_parallel.layers", "transformer_engine.pytorch.module"]
    )
    def test_parallel_linears_by_name(self, package):
        kind = type("ColumnParallelLinear", (nn.Module,), {"__module__": package})
        model = nn.ModuleDict({"linear_qkv": kind(), "q": nn.Linear(2, 2)})
        with pytest.raises(
            PeftError, match=r"linear_qkv is a ColumnParallelLinear: .*not supported"
        ):
            inject(model, LoRA(), targets=["*"])
        assert not adapters(model)


class TestRemove:
    def test_gives_back_the_model(self, model, ids):
        before, keys = model(ids), list(model.state_dict())
        inject(model, LoRA(rank=2), targets=["*_proj", "head"])
        randomize(model)
        assert not torch.allclose(model(ids), before)
        assert remove(model) == 7
        assert torch.equal(model(ids), before)
        assert list(model.state_dict()) == keys
        assert not adapters(model)

    def test_takes_out_a_module_at_two_places(self):
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict({"a": shared, "b": shared})
        inject(model, LoRA(), targets=["a"])
        assert remove(model) == 1
        assert model["a"] is model["b"] is shared


class TestDisabled:
    @pytest.mark.parametrize("merged", [False, True])
    def test_gives_the_outputs_of_the_base_within_the_block(self, model, ids, merged):
        before = model(ids)
        inject(model, LoRA(rank=2), targets=QV)
        randomize(model)
        if merged:
            for layer in adapters(model).values():
                layer.merge()
        adapted = model(ids)
        with disabled(model):
            assert torch.equal(model(ids), before)
        assert torch.equal(model(ids), adapted)
        assert all(layer.merged is merged for layer in adapters(model).values())

    def test_ends_with_an_exception_too(self, model):
        inject(model, LoRA(), targets=QV)
        with pytest.raises(KeyError, match="x"), disabled(model):
            raise KeyError("x")
        assert all(layer.enabled for layer in adapters(model).values())


class TestTransform:
    def test_is_found_by_name_and_says_what_trains(self, model, ids, caplog):
        transform = load("mb.model_transforms", "lora")(LoRA(rank=2, target_modules=QV))
        with caplog.at_level("INFO", logger="mb_peft.plugin"):
            out = transform.apply(model, ProcessLayout(tp=1, dp=2, world_size=2))
        assert out is model
        assert "DP2" in caplog.text
        assert "layers.*.q_proj" in caplog.text
        out(ids).sum().backward()
        for name, parameter in out.named_parameters():
            assert transform.trainable(f"module.{name}") is parameter.requires_grad
            assert parameter.requires_grad is (parameter.grad is not None)

    def test_only_the_first_rank_logs(self, model, caplog):
        transform = load("mb.model_transforms", "lora")(LoRA(target_modules=QV))
        with caplog.at_level("INFO", logger="mb_peft.plugin"):
            transform.apply(model, ProcessLayout(rank=1, world_size=2))
        assert not caplog.records


@pytest.mark.parametrize(
    ("method", "deviation"),
    [("xavier", (2 / 600) ** 0.5), ("kaiming", 1 / 1200**0.5), ("normal", 0.2), ("zero", 0.0)],
)
def test_matrices_start_with_the_deviation_of_their_method(method, deviation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 3))
    options = {"lora_A_init_method": method}
    if method == "zero":
        options["lora_B_init_method"] = "normal"
    inject(model, LoRA(rank=200, **options), targets=["0"])
    assert model[0].lora_a.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert model[0].lora_a.weight.mean().item() == pytest.approx(0, abs=2e-3)


def test_a_copy_of_an_adapted_model_is_its_own(model, ids):
    inject(model, LoRA(rank=2), targets=QV)
    randomize(model)
    twin = copy.deepcopy(model)
    before = twin(ids)
    randomize(model, seed=6)
    assert torch.equal(twin(ids), before)
    assert not torch.allclose(model(ids), before)


def test_the_weight_of_the_base_can_be_looked_at(model):
    head, v_proj = model.head.weight, model.layers[0].v_proj.bias
    inject(model, LoRA(), targets=["head", "v_proj", "q_proj"])
    assert model.head.weight is head
    assert model.layers[0].v_proj.bias is v_proj
    assert model.layers[0].q_proj.bias is None
    assert "rank=16, scale=2, merged=False" in repr(model.head)
