# SPDX-License-Identifier: Apache-2.0
"""Optimizers built from the configuration against torch's own and against the formulas."""

from __future__ import annotations

import sys
import warnings

import attrs
import pytest
import torch
from mb_config import ConfigContainer
from mb_config.errors import UserError
from mb_engine.runtime.megatron_compat import prepare_megatron
from mb_engine.runtime.megatron_cpu import install
from mb_engine.train.optimizer import build_optimizer, optimizer_settings
from mb_engine.train.schedule import ParamScheduler, Schedule
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core and torch.jit warn when imported
    install()
    prepare_megatron()
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module, MegatronModule

STEPS = 6
pytestmark = [  # what megatron-core's own code is warned of
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:full scope is deprecated"),
    pytest.mark.filterwarnings("ignore:MimoModelConfig is experimental"),
]


@pytest.fixture(autouse=True)
def groups():
    """One rank, without a port."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def config(**overrides) -> ConfigContainer:
    made = ConfigContainer()
    made.optimizer.lr, made.optimizer.weight_decay = 1e-2, 0.1
    made.optimizer.clip_grad = 0.0
    made.optimizer.use_distributed_optimizer = False
    for name, value in overrides.items():
        section, key = name.split("__")
        setattr(getattr(made, section), key, value)
    return made


class Tiny(MegatronModule):
    def __init__(self, settings: TransformerConfig) -> None:
        super().__init__(settings)
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def wrapped(made: ConfigContainer) -> DistributedDataParallel:
    settings = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        bf16=bool(made.optimizer.bf16),
    )
    module = Tiny(settings)
    if made.optimizer.bf16:
        module = Float16Module(settings, module)
    sharded = bool(made.optimizer.use_distributed_optimizer)
    return DistributedDataParallel(
        settings, DistributedDataParallelConfig(use_distributed_optimizer=sharded), module
    )


def made_up_gradients(params: list[torch.Tensor], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in params]


def train(made: ConfigContainer, **kwargs):
    """Train on made-up gradients; return the parameters before and after, and the optimizer."""
    model = wrapped(made)
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    optimizer = build_optimizer(made, [model], **kwargs)
    o = made.optimizer
    ParamScheduler(  # it is what takes weight decay off biases and norms
        optimizer=optimizer,
        schedule=Schedule(
            max_lr=o.lr, lr_decay_style="constant", start_wd=o.weight_decay, end_wd=o.weight_decay
        ),
    )
    for step in range(STEPS):
        for parameter, gradient in zip(params, made_up_gradients(params, step), strict=True):
            parameter.main_grad.copy_(gradient)
        assert optimizer.step()[0]
    return start, params, optimizer


def in_float64(made: ConfigContainer, start: list[torch.Tensor]) -> list[torch.Tensor]:
    """Train *start* by the formulas: AdamW is algorithm 2 of arXiv:1711.05101."""
    o = made.optimizer
    params = [p.double() for p in start]
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    for step in range(STEPS):
        grads = [g.double() for g in made_up_gradients(params, step)]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        clip = min(1.0, o.clip_grad / (norm + 1e-6)) if o.clip_grad else 1.0
        for i, p in enumerate(params):
            decay = o.weight_decay if p.dim() > 1 else 0.0
            g = grads[i] * clip
            if o.optimizer == "sgd":
                g = g + decay * p
                m[i] = o.sgd_momentum * m[i] + g
                params[i] = p - o.lr * m[i]
                continue
            if not o.decoupled_weight_decay:
                g = g + decay * p
                decay = 0.0
            m[i] = o.adam_beta1 * m[i] + (1 - o.adam_beta1) * g
            v[i] = o.adam_beta2 * v[i] + (1 - o.adam_beta2) * g * g
            m_hat = m[i] / (1 - o.adam_beta1 ** (step + 1))
            v_hat = v[i] / (1 - o.adam_beta2 ** (step + 1))
            params[i] = p - o.lr * (m_hat / (v_hat.sqrt() + o.adam_eps) + decay * p)
    return params


def assert_follows_the_formula(made: ConfigContainer) -> None:
    start, trained, _ = train(made)
    expected = in_float64(made, start)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(expected, start, strict=True))
    for got, wanted in zip(trained, expected, strict=True):
        torch.testing.assert_close(got.detach().double(), wanted, rtol=0, atol=5e-7)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_follows_the_formula_and_spares_biases_and_norms(sharded, decoupled):
    assert_follows_the_formula(
        config(
            optimizer__adam_beta1=0.8,
            optimizer__adam_beta2=0.9,
            optimizer__adam_eps=1e-3,
            optimizer__decoupled_weight_decay=decoupled,
            optimizer__use_distributed_optimizer=sharded,
        )
    )


def test_sgd_follows_the_formula():
    assert_follows_the_formula(config(optimizer__optimizer="sgd", optimizer__sgd_momentum=0.7))


def test_sgd_cannot_be_sharded():
    made = config(optimizer__optimizer="sgd", optimizer__use_distributed_optimizer=True)
    with pytest.raises(UserError, match=r"optimizer.optimizer=sgd .* set .* to false"):
        build_optimizer(made, [])


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_gradients_are_clipped_by_their_global_norm(kind):
    assert_follows_the_formula(
        config(optimizer__optimizer=kind, optimizer__clip_grad=0.25, optimizer__adam_eps=1e-2)
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_bf16_trains_a_copy_in_float32(sharded):
    made = config(
        optimizer__bf16=True,
        optimizer__params_dtype="bfloat16",
        optimizer__use_distributed_optimizer=sharded,
    )
    start, trained, _ = train(made)
    for got, wanted in zip(trained, in_float64(made, start), strict=True):
        assert got.dtype == torch.bfloat16
        # one rounding at the end; a bfloat16 copy alone would lose most of these small updates
        torch.testing.assert_close(got.detach(), wanted.bfloat16(), rtol=2**-7, atol=1e-5)


def test_every_cpu_parameter_is_updated_by_the_fused_kernel():
    for kind in ("adam", "sgd"):
        *_, optimizer = train(config(optimizer__optimizer=kind))
        assert [g["fused"] for g in optimizer.param_groups] == [True, True]
        assert sum(len(g["params"]) for g in optimizer.param_groups) == 5


def test_parameters_by_name_can_have_values_of_their_own():
    rules = {"*second*": {"max_lr": 1e-3, "min_lr": 1e-4}, "*norm*": {"lr_mult": 0.0}}
    start, trained, optimizer = train(config(), overrides=rules)
    by_rate: dict[float, list[tuple[int, ...]]] = {}
    for group in optimizer.param_groups:
        by_rate.setdefault(group["lr"], []).extend(tuple(p.shape) for p in group["params"])
    assert by_rate == {1e-2: [(8, 6), (8,)], 1e-3: [(4, 8)], 0.0: [(8,), (8,)]}
    norm = [i for i, p in enumerate(start) if p.shape == (8,)][1:]
    assert all(torch.equal(start[i], trained[i]) for i in norm)


def test_every_optimizer_field_reaches_megatron():
    made = config(optimizer__muon_nesterov=True)
    settings = optimizer_settings(made)
    fields = attrs.asdict(made.optimizer, recurse=False)
    fields.pop("overrides")  # given beside the settings
    if not hasattr(settings, "muon_nesterov"):
        fields["muon_use_nesterov"] = fields.pop("muon_nesterov")  # its name in 0.16
    for name, value in fields.items():
        expected = getattr(torch, value) if name.endswith("_dtype") and value else value
        assert hasattr(settings, name), name
        assert getattr(settings, name) == expected or value is None, name


def test_precision_fields_reach_megatron_only_with_fp8():
    from mb_config import MixedPrecisionConfig

    made = config()
    made.mixed_precision = MixedPrecisionConfig(bf16=True)
    assert optimizer_settings(made).fp8_recipe is None
    made.mixed_precision = MixedPrecisionConfig(bf16=True, fp8="hybrid", fp8_recipe="blockwise")
    assert optimizer_settings(made).fp8_recipe == "blockwise"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_is_refused_without_one():
    with pytest.raises(UserError, match=r"offload.optimizer_cpu_offload=True .* set it to false"):
        build_optimizer(config(offload__optimizer_cpu_offload=True), [])


def test_what_needs_transformer_engine_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "mb-engine\[te\]"'):
        build_optimizer(config(optimizer__use_precision_aware_optimizer=True), [])


def test_what_megatron_refuses_becomes_one_line():
    with pytest.raises(UserError, match=r"the optimizer section cannot be used: exp_avg_dtype"):
        optimizer_settings(config(optimizer__exp_avg_dtype="bfloat16"))


def test_overrides_of_the_configuration_and_of_the_call_add_up():
    made = config(optimizer__overrides={"*second*": {"max_lr": 1e-3, "min_lr": 1e-4}})
    *_, optimizer = train(made, overrides={"*norm*": {"lr_mult": 0.0}})
    rates = sorted(group["lr"] for group in optimizer.param_groups for _ in group["params"])
    assert rates == [0.0, 0.0, 1e-3, 1e-2, 1e-2]


def test_muon_says_what_it_needs(monkeypatch):
    made = config(optimizer__optimizer="muon")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"optimizer=muon: needs megatron-core 0.19, installed is"):
        build_optimizer(made, [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "emerging_optimizers", None)
    with pytest.raises(UserError, match=r"emerging-optimizers with triton .*; pip install"):
        build_optimizer(made, [])
