# SPDX-License-Identifier: Apache-2.0
"""Lines of tables of tensors that families share; each with the condition under which it holds."""

from __future__ import annotations

from mb_engine.bridge.mapping import Rule

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def _all(names: tuple[str, ...], kind: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names)


ENDS = (
    (
        "always",
        Rule(
            "embedding.word_embeddings.weight",
            "model.embed_tokens.weight",
            ("vocab", "hidden"),
            "once",
            "vocabulary",
        ),
    ),
    ("always", Rule("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",), "once")),
    (
        "untied",
        Rule("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), "once", "vocabulary"),
    ),
)
"""Embedding, final norm and output layer."""

ATTENTION = (
    (
        "always",
        Rule("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", ("hidden",)),
    ),
    (
        "always",
        Rule(
            "self_attention.linear_qkv.weight",
            _all(_QKV, "weight"),
            (("query", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
            form="groups",
        ),
    ),
    (
        "qkv bias",
        Rule(
            "self_attention.linear_qkv.bias",
            _all(_QKV, "bias"),
            (("query",), ("kv",), ("kv",)),
            form="groups",
        ),
    ),
    (
        "always",
        Rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("hidden", "query")),
    ),
    (
        "output bias",
        Rule("self_attention.linear_proj.bias", "self_attn.o_proj.bias", ("hidden",)),
    ),
    ("qk norm", Rule("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", ("head",))),
    ("qk norm", Rule("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", ("head",))),
)
"""Norm, projections and biases of attention; norms of queries and keys."""

MLP = (
    ("always", Rule("mlp.linear_fc1.weight", _all(_GATE_UP, "weight"), ("ffn", "hidden"), "dense")),
    ("mlp bias", Rule("mlp.linear_fc1.bias", _all(_GATE_UP, "bias"), ("ffn",), "dense")),
    ("always", Rule("mlp.linear_fc2.weight", "mlp.down_proj.weight", ("hidden", "ffn"), "dense")),
    ("mlp bias", Rule("mlp.linear_fc2.bias", "mlp.down_proj.bias", ("hidden",), "dense")),
)
"""A gated MLP."""

MLP_NORM = (
    (
        "always",
        Rule(
            "mlp.linear_fc1.layer_norm_weight",
            "post_attention_layernorm.weight",
            ("hidden",),
            "dense",
        ),
    ),
)
"""The norm before a dense MLP, as all but Gemma 2 and 3 call it."""

DENSE = (*ENDS, *ATTENTION, *MLP_NORM, *MLP)
"""A decoder like Llama."""

AROUND_BRANCHES = (
    (
        "always",
        Rule(
            "self_attention.linear_proj.post_layernorm.weight",
            "post_attention_layernorm.weight",
            ("hidden",),
        ),
    ),
    (
        "always",
        Rule("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm.weight", ("hidden",)),
    ),
    (
        "always",
        Rule(
            "mlp.linear_fc2.post_layernorm.weight",
            "post_feedforward_layernorm.weight",
            ("hidden",),
        ),
    ),
)
"""Norms after attention and around the MLP, as in Gemma 2 and 3."""


def experts(
    block: str = "mlp", *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[tuple[str, Rule], ...]:
    """Return the lines of a layer with experts, one by one on disk or all in one tensor.

    Args:
        block: What names of tensors begin with within a layer.
        gate: Name of an expert's gate projection.
        up: Of its up projection.
        down: Of its down projection.
    """
    fc1, fc2 = (f"mlp.experts.experts.linear_fc{i}.weight" for i in (1, 2))
    each = block + ".experts.{expert}."
    return (
        (
            "always",
            Rule(
                "pre_mlp_layernorm.weight",
                "post_attention_layernorm.weight",
                ("hidden",),
                "experts",
            ),
        ),
        (
            "always",
            Rule("mlp.router.weight", f"{block}.gate.weight", ("experts", "hidden"), "experts"),
        ),
        (
            "apart",
            Rule(
                fc1,
                (f"{each}{gate}.weight", f"{each}{up}.weight"),
                ("expert_ffn", "hidden"),
                "experts",
            ),
        ),
        (
            "apart",
            Rule(fc2, f"{each}{down}.weight", ("hidden", "expert_ffn"), "experts"),
        ),
        (
            "fused",
            Rule(
                fc1,
                f"{block}.experts.gate_up_proj",
                ("experts", "two_expert_ffn", "hidden"),
                "experts",
            ),
        ),
        (
            "fused",
            Rule(
                fc2,
                f"{block}.experts.down_proj",
                ("experts", "hidden", "expert_ffn"),
                "experts",
            ),
        ),
    )


SHARED_EXPERT = (
    (
        "always",
        Rule(
            "mlp.shared_experts.linear_fc1.weight",
            ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
            ("shared_ffn", "hidden"),
            "experts",
        ),
    ),
    (
        "always",
        Rule(
            "mlp.shared_experts.linear_fc2.weight",
            "mlp.shared_expert.down_proj.weight",
            ("hidden", "shared_ffn"),
            "experts",
        ),
    ),
    (
        "always",
        Rule(
            "mlp.shared_experts.gate_weight",
            "mlp.shared_expert_gate.weight",
            ("one", "hidden"),
            "experts",
        ),
    ),
)
"""An expert that every token goes to, weighed by a gate."""
