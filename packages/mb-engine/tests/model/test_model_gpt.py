# SPDX-License-Identifier: Apache-2.0
"""From a configuration to megatron-core's, and to the chunks of this rank."""

from __future__ import annotations

import re

import pytest
import torch
from mb_config import ConfigError
from mb_engine.errors import EngineError
from mb_engine.testing import tiny_config
from torch.nn import functional


@pytest.fixture(scope="module", autouse=True)
def layout():
    from mb_engine.runtime.distributed import initialize, shutdown
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config().finalize(1)
    layout = initialize(config)
    seed_everything(config.rng, layout)
    yield layout
    shutdown()


def translate(*overrides):
    from mb_engine.model.gpt import transformer_config

    return transformer_config(tiny_config(*overrides).finalize(1))


def build(layout, *overrides):
    from mb_engine.model.gpt import build_model

    (chunk,) = build_model(tiny_config("model.num_layers=2", *overrides).finalize(1), layout)
    return chunk


def test_fields_of_every_section_pass_by_name():
    config = translate(
        "model.layernorm_epsilon=1e-6",
        "model.rotary_interleaved=true",
        "recompute.recompute_granularity=full",
        "recompute.recompute_method=uniform",
        "recompute.recompute_num_layers=2",
        "cuda_graph.cuda_graph_warmup_steps=5",
        "mixed_precision=bf16_mixed",
    )
    assert config.layernorm_epsilon == 1e-6
    assert config.rotary_interleaved
    assert (config.recompute_granularity, config.recompute_num_layers) == ("full", 2)
    assert config.cuda_graph_warmup_steps == 5
    assert config.batch_p2p_comm is False  # True by megatron-core's default
    assert config.bf16
    assert config.params_dtype == torch.bfloat16
    assert config.transformer_impl == "local"


def test_what_cuda_graphs_capture_passes_under_the_name_of_each_version():
    from mb_engine.runtime.megatron_compat import cuda_graph_fields

    old, new = {"cuda_graph_scope"}, {"cuda_graph_scope", "cuda_graph_modules"}
    assert cuda_graph_fields(None, known=old) == {"cuda_graph_scope": []}
    assert cuda_graph_fields(["attn"], known=new) == {"cuda_graph_modules": ["attn"]}
    assert cuda_graph_fields(["full_iteration"], known=new) == {
        "cuda_graph_modules": [],
        "cuda_graph_impl": "full_iteration",
    }


@pytest.mark.parametrize(
    ("name", "function"),
    [("silu", functional.silu), ("gelu", functional.gelu), ("relu", functional.relu)],
)
def test_activations_go_by_name(name, function):
    assert translate(f"model.activation_func={name}").activation_func is function


def test_squared_relu_is_the_square_of_relu():
    x = torch.linspace(-2, 2, 9)
    function = translate("model.activation_func=squared_relu").activation_func
    torch.testing.assert_close(function(x), x.clamp(min=0) ** 2)


def test_other_megatron_fields_pass_through():
    config = translate("model.megatron={apply_query_key_layer_scaling: true, test_mode: true}")
    assert config.apply_query_key_layer_scaling
    assert config.test_mode


def test_an_unknown_megatron_field_is_refused_with_the_nearest_name():
    message = (
        r"model\.megatron\.rotary_interleave=True: megatron-core .* did you mean rotary_interl"
    )
    with pytest.raises(ConfigError, match=message):
        translate("model.megatron={rotary_interleave: true}")


def test_models_with_different_attention_kernels_can_be_built_in_one_process(layout):
    tokens = torch.arange(32)[None]
    kernels = ("auto", "flash", "unfused", "auto")
    logits = [build(layout, f"model.attention_backend={k}")(tokens, None, None) for k in kernels]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-6)


def test_transformer_engine_is_refused_where_it_cannot_run():
    if torch.cuda.is_available():
        pytest.skip("a machine with CUDA")
    with pytest.raises(EngineError, match=r"model\.layer_spec=te: Transformer Engine .*torch"):
        translate("model.layer_spec=te", "dist.device=auto")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16_mixed", torch.bfloat16), ("fp16_mixed", torch.float16)]
)
def test_16_bit_models_are_wrapped_and_give_float32_losses(precision, dtype, layout):
    chunk = build(layout, f"mixed_precision={precision}")
    assert type(chunk).__name__ == "Float16Module"
    assert {p.dtype for p in chunk.parameters()} == {dtype}
    tokens = torch.arange(64).view(2, 32)
    losses = chunk(tokens, None, None, labels=tokens)
    assert losses.shape == (2, 32)
    assert losses.dtype == torch.float32
    exact = build(layout)(tokens, None, None, labels=tokens)
    torch.testing.assert_close(losses, exact, rtol=2e-2, atol=5e-2)


def test_without_labels_the_model_returns_logits_by_sample(layout):
    logits = build(layout)(torch.zeros(2, 32, dtype=torch.int64), None, None)
    assert logits.shape == (2, 32, 128)


def test_weights_have_the_distributions_of_megatron_core(layout):
    parameters = dict(
        build(layout, "model.init_method_std=0.05", "model.ffn_hidden_size=512").named_parameters()
    )
    layer = "decoder.layers.1."
    for name in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"):
        assert parameters[layer + name].std().item() == pytest.approx(0.05, rel=0.05)
    # Matrices that write into the residual stream are scaled down by sqrt(2 x layers).
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        assert parameters[layer + name].std().item() == pytest.approx(0.025, rel=0.05)
    assert parameters["embedding.word_embeddings.weight"].std().item() == pytest.approx(
        0.05, rel=0.05
    )
    assert parameters["decoder.final_layernorm.weight"].unique().tolist() == [1.0]


def test_initial_weights_differ_over_layers_and_seeds_and_repeat(layout):
    def weight(chunk, layer):
        return dict(chunk.named_parameters())[f"decoder.layers.{layer}.mlp.linear_fc2.weight"]

    first, again, other = build(layout), build(layout), build(layout, "rng.seed=5")
    assert torch.equal(weight(first, 0), weight(again, 0))
    assert not torch.equal(weight(first, 0), weight(first, 1))
    assert not torch.equal(weight(first, 0), weight(other, 0))


def test_drawing_weights_leaves_the_random_state_alone(layout):
    from mb_engine.model.gpt import transformer_config
    from mb_engine.model.initialization import initialize_weights

    chunk, config = build(layout), tiny_config().finalize(1)
    before = torch.get_rng_state()
    initialize_weights([chunk], transformer_config(config), config.rng, layout)
    assert torch.equal(before, torch.get_rng_state())


def checkpoint_names(chunk):
    from mb_engine.parallel.shards import model_shards

    return {re.sub(r"layers\.\d+", "layers.N", shard.key) for shard in model_shards([chunk])}


def test_checkpoints_have_transformer_engines_names(layout):
    names = checkpoint_names(build(layout, "model.qk_layernorm=true"))
    layer = "model.decoder.layers.N."
    assert names == {
        "model.embedding.word_embeddings.weight",
        layer + "self_attention.linear_qkv.layer_norm_weight",
        layer + "self_attention.linear_qkv.weight",
        layer + "self_attention.q_layernorm.weight",
        layer + "self_attention.k_layernorm.weight",
        layer + "self_attention.linear_proj.weight",
        layer + "mlp.linear_fc1.layer_norm_weight",
        layer + "mlp.linear_fc1.weight",
        layer + "mlp.linear_fc2.weight",
        "model.decoder.final_layernorm.weight",
        "model.output_layer.weight",
    }


def test_the_norm_before_experts_keeps_its_own_name(layout):
    names = checkpoint_names(build(layout, "model.num_moe_experts=4"))
    # Transformer Engine has no linear there that the norm could be a part of.
    assert "model.decoder.layers.N.pre_mlp_layernorm.weight" in names
    assert "model.decoder.layers.N.mlp.router.weight" in names


def test_latent_attention_has_transformer_engines_names(layout):
    names = checkpoint_names(
        build(
            layout,
            "model.multi_latent_attention=true",
            "model.num_query_groups=null",
            "model.q_lora_rank=24",
            "model.qk_layernorm=true",
        )
    )
    attention = "model.decoder.layers.N.self_attention."
    assert {n for n in names if n.startswith(attention)} == {
        attention + "linear_q_down_proj.weight",
        attention + "linear_q_up_proj.layer_norm_weight",
        attention + "linear_q_up_proj.weight",
        attention + "linear_kv_down_proj.weight",
        attention + "linear_kv_up_proj.layer_norm_weight",
        attention + "linear_kv_up_proj.weight",
        attention + "linear_proj.weight",
    }
    # Transformer Engine has no linear that takes the whole input of latent attention.
    assert "model.decoder.layers.N.input_layernorm.weight" in names


def test_packed_samples_are_refused_with_predictions_ahead(layout):
    from mb_engine.model.attention.packed import PackedSequences
    from mb_engine.parallel.sequence import read_packing

    chunk = build(layout, "model.mtp_num_layers=1")
    tokens = torch.arange(32)[None]
    packing = read_packing(
        {"tokens": tokens, "cu_seqlens": torch.tensor([0, 20, 32], dtype=torch.int32)}, cp=1
    )
    packed = PackedSequences.of(packing, device=torch.device("cpu"), cp=1, cp_rank=0)
    with pytest.raises(EngineError, match=r"model\.mtp_num_layers: .*cross from one packed sample"):
        chunk(tokens, None, None, labels=tokens, packed_seq_params=packed)


def test_predictions_ahead_need_labels_to_learn_from(layout):
    chunk, tokens = build(layout, "model.mtp_num_layers=1"), torch.arange(32)[None]
    with pytest.raises(EngineError, match=r"model\.mtp_num_layers: its layers learn from"):
        chunk(tokens, None, None)
    assert chunk.eval()(tokens, None, None).shape == (1, 32, 128)
