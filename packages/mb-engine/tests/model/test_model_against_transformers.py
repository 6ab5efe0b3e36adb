# SPDX-License-Identifier: Apache-2.0
"""The torch spec computes what Hugging Face's models of the same architecture compute."""

from __future__ import annotations

import pytest
import torch
from mb_engine.testing import tiny_config

transformers = pytest.importorskip("transformers")

HEADS, GROUPS, HEAD, VOCAB, LENGTH = 4, 2, 16, 128, 32
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HEADS * HEAD,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}

CASES = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), []),
    "llama, tied embeddings": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**LLAMA | {"tie_word_embeddings": True})
        ),
        ["model.share_embeddings_and_output_weights=true"],
    ),
    "mistral, sliding window": (
        lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**LLAMA, sliding_window=8)
        ),
        # There a window counts the token itself, here the tokens before it.
        ["model.window_size=[7, 0]"],
    ),
    "qwen3, normalized queries and keys": (
        lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=HEAD)),
        ["model.qk_layernorm=true"],
    ),
    "qwen2, bias of queries, keys and values": (
        lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)),
        ["model.add_qkv_bias=true"],
    ),
    "mixtral, experts": (
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)
        ),
        ["model.num_moe_experts=4", "model.moe_router_topk=2"],
    ),
}


def to_grouped(q, k, v):
    """Interleave rows as megatron-core does: the queries of a group, its key, its value."""
    q = q.view(GROUPS, HEADS // GROUPS * HEAD, *q.shape[1:])
    k, v = (x.view(GROUPS, HEAD, *x.shape[1:]) for x in (k, v))
    return torch.cat([q, k, v], dim=1).flatten(0, 1)


def layer_weights(theirs, i, experts):
    """Return the weights of one layer under megatron-core's names."""
    p = f"model.layers.{i}."
    attention = p + "self_attn."
    ours = {
        "input_layernorm.weight": theirs[p + "input_layernorm.weight"],
        "pre_mlp_layernorm.weight": theirs[p + "post_attention_layernorm.weight"],
        "self_attention.linear_proj.weight": theirs[attention + "o_proj.weight"],
    }
    for kind in ("weight", "bias"):
        if attention + f"q_proj.{kind}" in theirs:
            parts = (theirs[f"{attention}{x}_proj.{kind}"] for x in "qkv")
            ours[f"self_attention.linear_qkv.{kind}"] = to_grouped(*parts)
    for x in "qk":
        if attention + f"{x}_norm.weight" in theirs:
            ours[f"self_attention.{x}_layernorm.weight"] = theirs[f"{attention}{x}_norm.weight"]
    if not experts:
        gate, up, down = (theirs[f"{p}mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        ours["mlp.linear_fc1.weight"] = torch.cat([gate, up])
        ours["mlp.linear_fc2.weight"] = down
        return ours
    ours["mlp.router.weight"] = theirs[p + "block_sparse_moe.gate.weight"]
    for e in range(experts):
        expert = f"{p}block_sparse_moe.experts.{e}."
        local = f"mlp.experts.local_experts.{e}."
        ours[local + "linear_fc1.weight"] = torch.cat(
            [theirs[expert + "w1.weight"], theirs[expert + "w3.weight"]]
        )
        ours[local + "linear_fc2.weight"] = theirs[expert + "w2.weight"]
    return ours


def to_ours(theirs, *, layers, experts, tied):
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
    }
    if not tied:
        ours["output_layer.weight"] = theirs["lm_head.weight"]
    for i in range(layers):
        for name, value in layer_weights(theirs, i, experts).items():
            ours[f"decoder.layers.{i}.{name}"] = value
    return ours


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    from mb_engine.runtime.distributed import initialize, shutdown

    yield initialize(tiny_config().finalize(1))
    shutdown()


def build(layout, overrides):
    from mb_engine.model.gpt import build_model
    from mb_engine.runtime.seeding import seed_everything

    config = tiny_config("model.num_layers=2", *overrides).finalize(1)
    seed_everything(config.rng, layout)
    return build_model(config, layout)[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of(case, process_groups):
    make, overrides = CASES[case]
    torch.manual_seed(0)
    theirs = make()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.dim() == 1:  # biases and norms, which start as constants
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.dtype == torch.float32, name
    ours = build(process_groups, overrides)
    arguments = {
        "layers": 2,
        "experts": 4 if "mixtral" in case else 0,
        "tied": "tied" in case,
    }
    weights = to_ours(dict(theirs.named_parameters()), **arguments)
    parameters = dict(ours.named_parameters())
    assert set(weights) == set(parameters)
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)

    ids = torch.randint(0, VOCAB, (2, LENGTH + 1))
    tokens, labels = ids[:, :-1], ids[:, 1:].contiguous()
    expected = theirs(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, None, None), expected, rtol=1e-5, atol=2e-6)

    losses = ours(tokens, None, None, labels=labels)
    reference = -expected.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(losses, reference.float(), rtol=1e-5, atol=2e-6)
    losses.sum().backward()
    reference.sum().backward()
    gradients = to_ours({n: p.grad for n, p in theirs.named_parameters()}, **arguments)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            parameters[name].grad, gradient, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gpt2_with_layer_norm_biases_gelu_and_learned_positions(process_groups):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=LENGTH,
            n_embd=64,
            n_layer=2,
            n_head=HEADS,
            n_inner=128,
            activation_function="gelu",
            attn_implementation="eager",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = build(
        process_groups,
        [
            "model.num_query_groups=4",
            "model.normalization=LayerNorm",
            "model.activation_func=gelu",
            "model.gated_linear_unit=false",
            "model.add_bias_linear=true",
            "model.position_embedding_type=learned_absolute",
            "model.share_embeddings_and_output_weights=true",
        ],
    )
    source = {n.removeprefix("transformer."): p for n, p in theirs.named_parameters()}
    weights = {
        "embedding.word_embeddings.weight": source["wte.weight"],
        "embedding.position_embeddings.weight": source["wpe.weight"],
    }
    for kind in ("weight", "bias"):
        weights[f"decoder.final_layernorm.{kind}"] = source[f"ln_f.{kind}"]
        for i in range(2):
            p, ours_p = f"h.{i}.", f"decoder.layers.{i}."
            weights[ours_p + f"input_layernorm.{kind}"] = source[p + f"ln_1.{kind}"]
            weights[ours_p + f"pre_mlp_layernorm.{kind}"] = source[p + f"ln_2.{kind}"]
            qkv = source[p + f"attn.c_attn.{kind}"].t()  # its matrices are [in, out]
            q, k, v = (x.view(HEADS, HEAD, *x.shape[1:]) for x in qkv.chunk(3))
            mixed = torch.cat([q, k, v], dim=1).flatten(0, 1)
            weights[ours_p + f"self_attention.linear_qkv.{kind}"] = mixed
            for mine, name in (
                ("self_attention.linear_proj", "attn.c_proj"),
                ("mlp.linear_fc1", "mlp.c_fc"),
                ("mlp.linear_fc2", "mlp.c_proj"),
            ):
                weights[f"{ours_p}{mine}.{kind}"] = source[f"{p}{name}.{kind}"].t()
    parameters = dict(ours.named_parameters())
    assert set(weights) == set(parameters)
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
        tokens = torch.randint(0, VOCAB, (2, LENGTH))
        positions = torch.arange(LENGTH).expand(2, -1)
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens, positions, None), expected, rtol=1e-5, atol=5e-6)


QWEN_MOE = LLAMA | {
    "decoder_sparse_step": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 96,
    "norm_topk_prob": False,
}
DEEPSEEK = {
    "vocab_size": VOCAB,
    "hidden_size": HEADS * HEAD,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-6,  # what its norms of compressed states have, whatever is set
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
LATENT = [
    "model.multi_latent_attention=true",
    "model.num_query_groups=null",
    "model.q_lora_rank=24",
    "model.kv_lora_rank=16",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=12",
    "model.qk_layernorm=true",
]
FINE_GRAINED = {
    "qwen2 moe, gated shared expert": (
        lambda: transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**QWEN_MOE)),
        [
            "model.add_qkv_bias=true",
            "model.num_moe_experts=4",
            "model.moe_ffn_hidden_size=48",
            "model.moe_router_pre_softmax=true",
            "model.moe_shared_expert_intermediate_size=96",
            "model.moe_shared_expert_gate=true",
        ],
    ),
    "deepseek v3, latent attention, biased groups of experts": (
        lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**DEEPSEEK)),
        [
            *LATENT,
            "model.layernorm_epsilon=1e-6",
            "model.num_moe_experts=4",
            "model.moe_layer_freq=[0, 1]",
            "model.moe_ffn_hidden_size=48",
            "model.moe_router_score_function=sigmoid",
            "model.moe_router_enable_expert_bias=true",
            "model.moe_router_load_balancing_type=none",
            "model.moe_router_num_groups=2",
            "model.moe_router_group_topk=1",
            "model.moe_router_topk_scaling_factor=1.5",
            "model.moe_shared_expert_intermediate_size=48",
        ],
    ),
}
LATENT_NAMES = {
    "q_a_proj": "linear_q_down_proj",
    "q_a_layernorm": "q_layernorm",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_a_layernorm": "kv_layernorm",
    "kv_b_proj": "linear_kv_up_proj",
}


def gated_mlp(theirs, prefix, ours):
    gate, up, down = (theirs[f"{prefix}.{x}_proj.weight"] for x in ("gate", "up", "down"))
    return {
        f"{ours}.linear_fc1.weight": torch.cat([gate, up]),
        f"{ours}.linear_fc2.weight": down,
    }


def fine_grained_layer(theirs, i):
    """Return the weights of one layer of Qwen2-MoE or DeepSeek-V3 under megatron-core's names."""
    p = f"model.layers.{i}."
    mlp = p + "mlp"
    dense = {p + f"mlp.{x}_proj.weight": torch.zeros(1, 1) for x in ("gate", "up", "down")}
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    attention = {
        f"{p}self_attn.{x}_proj.weight": torch.zeros(n * HEAD, 1) for x, n in heads.items()
    }
    latent = p + "self_attn.q_a_proj.weight" in theirs
    ours = layer_weights(dense | (attention if latent else {}) | theirs, i, 0)
    if latent:
        del ours["self_attention.linear_qkv.weight"]
        for name, mine in LATENT_NAMES.items():
            ours[f"self_attention.{mine}.weight"] = theirs[f"{p}self_attn.{name}.weight"]
    if mlp + ".gate.weight" not in theirs:
        return ours
    del ours["mlp.linear_fc1.weight"], ours["mlp.linear_fc2.weight"]
    ours["mlp.router.weight"] = theirs[mlp + ".gate.weight"]
    for e in range(4):
        ours |= gated_mlp(theirs, f"{mlp}.experts.{e}", f"mlp.experts.local_experts.{e}")
    shared = "shared_experts" if latent else "shared_expert"
    ours |= gated_mlp(theirs, f"{mlp}.{shared}", "mlp.shared_experts")
    if not latent:
        ours["mlp.shared_experts.gate_weight"] = theirs[mlp + ".shared_expert_gate.weight"]
    return ours


def fine_grained(theirs):
    ours = to_ours(theirs, layers=0, experts=0, tied=False)
    for i in range(2):
        for name, value in fine_grained_layer(theirs, i).items():
            ours[f"decoder.layers.{i}.{name}"] = value
    return ours


@pytest.mark.parametrize("case", FINE_GRAINED)
def test_fine_grained_experts_are_those_of(case, process_groups):
    make, overrides = FINE_GRAINED[case]
    torch.manual_seed(0)
    theirs = make().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = build(process_groups, overrides)
    parameters, weights = (
        dict(ours.named_parameters()),
        fine_grained(dict(theirs.named_parameters())),
    )
    assert set(weights) == set(parameters)
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # Larger than differences of scores, so that it changes the choice.
                buffer.copy_(torch.randn(4) * 0.05)
                ours.decoder.layers[1].mlp.router.expert_bias.copy_(buffer)

    ids = torch.randint(0, VOCAB, (2, LENGTH + 1))
    tokens, labels = ids[:, :-1], ids[:, 1:].contiguous()
    expected = theirs(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, None, None), expected, rtol=1e-5, atol=2e-6)
    ours(tokens, None, None, labels=labels).sum().backward()
    losses = -expected.double().log_softmax(-1).gather(-1, labels[..., None])
    losses.sum().backward()
    gradients = fine_grained(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    )
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            parameters[name].grad, gradient, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
