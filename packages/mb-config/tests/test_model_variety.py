# SPDX-License-Identifier: Apache-2.0
"""Rules of experts and of how layers are cut into pipeline stages."""

from __future__ import annotations

import pytest
from mb_config import ConfigError
from mb_config.pipeline import parse_layout, stage_chunks

PP2 = "model.pipeline_model_parallel_size=2"
MOE = "model.num_moe_experts=4"
MLA = "model.multi_latent_attention=true"
AHEAD = "model.mtp_num_layers=1"
LAYOUT = "model.pipeline_model_parallel_layout"


def layout(text):
    return f'{LAYOUT}="{text}"'


BROKEN = [
    ([layout("Ett|ttL")], LAYOUT, "needs pipeline parallelism"),
    ([PP2, layout("Ett|ttxL")], LAYOUT, "written with E, t, m, L"),
    ([PP2, layout("E((tt)*2|)*2L")], LAYOUT, "without nesting"),
    ([PP2, layout("Ett|t|tL")], LAYOUT, "has 3 stages, not a multiple"),
    ([PP2, layout("Ett|tL")], LAYOUT, "has 3 layers t, model.num_layers is 4"),
    ([PP2, layout("Ett|ttmL")], LAYOUT, "has 1 layers m, model.mtp_num_layers is 0"),
    ([PP2, layout("ttE|ttL")], LAYOUT, "must begin with its only E"),
    ([PP2, layout("Ett|ttLE")], LAYOUT, "must begin with its only E"),
    ([PP2, layout("|EttttL")], LAYOUT, "must begin with its only E"),
    ([PP2, layout("Et|t|tm|tL"), "model.mtp_num_layers=1"], LAYOUT, "one of the last stages"),
    ([PP2, layout("Et|tm|t|tL"), "model.mtp_num_layers=1"], LAYOUT, "one of the last stages"),
    ([PP2, layout("Et|t|t|tL"), "model.virtual_pipeline_model_parallel_size=3"],
     "model.virtual_pipeline_model_parallel_size", "has 4 stages for PP 2, that is 2 each"),
    ([PP2, layout("Et|tttL"), "model.num_layers_in_first_pipeline_stage=1"],
     "model.num_layers_in_first_pipeline_stage", "says which layers a stage holds"),
    ([PP2, "model.account_for_loss_in_pipeline_split=true"], "model.num_layers",
     "with the 1 of embedding and loss.*use 5 layers"),
    (["model.account_for_loss_in_pipeline_split=true"],
     "model.account_for_loss_in_pipeline_split", "needs pipeline parallelism"),
    ([PP2, "model.account_for_embedding_in_pipeline_split=true",
      "model.num_layers_in_first_pipeline_stage=1"],
     "model.account_for_embedding_in_pipeline_split", "does not go with numbers of layers"),
    (["model.moe_router_enable_expert_bias=true"], "model.moe_router_enable_expert_bias",
     "needs experts"),
    ([MOE, "model.moe_router_enable_expert_bias=true"], "model.moe_router_enable_expert_bias",
     "needs moe_router_score_function=sigmoid"),
    ([MOE, "model.moe_router_num_groups=2"], "model.moe_router_num_groups", "goes with"),
    ([MOE, "model.moe_router_num_groups=3", "model.moe_router_group_topk=1"],
     "model.moe_router_num_groups", "must divide num_moe_experts=4"),
    ([MOE, "model.moe_router_num_groups=4", "model.moe_router_group_topk=1"],
     "model.moe_router_group_topk", "must hold that many experts"),
    ([MOE, "model.moe_pad_expert_input_to_capacity=true"],
     "model.moe_pad_expert_input_to_capacity", "needs a capacity"),
    ([MOE, "model.moe_expert_capacity_factor=1", "model.moe_token_drop_policy=position",
      "model.context_parallel_size=2"], "model.moe_token_drop_policy", "not known"),
    ([MOE, "model.moe_shared_expert_gate=true"], "model.moe_shared_expert_gate", "shared expert"),
    ([MOE, "model.moe_shared_expert_intermediate_size=64", "model.add_bias_linear=true"],
     "model.moe_shared_expert_intermediate_size", "has no bias"),
    ([MOE, "model.moe_token_dispatcher_type=flex"], "model.moe_token_dispatcher_type",
     "sends tokens between ranks"),
    ([MOE, "model.tensor_model_parallel_size=2", "model.sequence_parallel=true",
      "model.expert_tensor_parallel_size=1"], "model.expert_tensor_parallel_size",
     "gives wrong gradients without expert parallelism"),
    (["model.q_lora_rank=8"], "model.q_lora_rank", "needs multi_latent_attention"),
    ([MLA], "model.num_query_groups", "a key and a value for each head"),
    ([MLA, "model.num_query_groups=null", "model.kv_channels=7"], "model.kv_channels",
     "would be 192"),
    ([MLA, "model.num_query_groups=null", "model.qk_pos_emb_head_dim=7"],
     "model.qk_pos_emb_head_dim", "must be even"),
    ([MLA, "model.num_query_groups=null", "model.position_embedding_type=none"],
     "model.position_embedding_type", "has rotary positions"),
    ([MLA, "model.num_query_groups=null", "model.add_qkv_bias=true"], "model.add_qkv_bias",
     "have no bias"),
    ([MLA, "model.num_query_groups=null", "model.tensor_model_parallel_size=2"],
     "model.sequence_parallel", "what ranks share"),
    ([AHEAD, "model.position_embedding_type=learned_absolute"], "model.mtp_num_layers",
     "do not go with learned positions"),
    ([AHEAD, PP2, "model.share_embeddings_and_output_weights=true"], "model.mtp_num_layers",
     "an output weight there that nothing trains"),
    ([AHEAD, ("recompute={recompute_granularity: full, recompute_method: block,"
      " recompute_num_layers: 1}")], "model.mtp_num_layers", "one layer at a time"),
    ([AHEAD, "model.window_size=[4, 0]", "model.window_attn_skip_freq=[1, 0, 1, 0]"],
     "model.mtp_num_layers", "no place in a list"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "field", "says"), BROKEN, ids=lambda v: str(v)[:60])
def test_a_broken_rule_names_its_field(small, overrides, field, says):
    config = small.override(*overrides)
    with pytest.raises(ConfigError, match=rf"{field.replace('.', chr(92) + '.')}=.*{says}"):
        config.finalize(world_size=4)


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("Ett|ttL", ["Ett", "ttL"]),
        ("E|t*3|(t|)*3tt|m|L", ["E", "ttt", "t", "t", "t", "tt", "m", "L"]),
        ("Et*2,|(tt|)*2,L", ["Ett", "tt", "tt", "L"]),
        ("(Et|)*1 t L", ["Et", "tL"]),
    ],
)
def test_a_layout_is_read_as_written(text, chunks):
    assert parse_layout(text) == chunks


def held(config):
    return [
        [(list(c.layers), c.embedding, c.mtp, c.loss) for c in stage]
        for stage in stage_chunks(config.finalize(world_size=4).model)
    ]


def test_chunks_follow_from_the_numbers_of_layers(small):
    assert held(small.override(PP2)) == [
        [([0, 1], True, 0, False)],
        [([2, 3], False, 0, True)],
    ]
    uneven = small.override(PP2, "model.num_layers_in_first_pipeline_stage=1")
    assert [stage[0][0] for stage in held(uneven)] == [[0], [1, 2, 3]]
    accounted = small.override(
        PP2, "model.num_layers=5", "model.account_for_loss_in_pipeline_split=true"
    )
    assert [stage[0][0] for stage in held(accounted)] == [[0, 1, 2], [3, 4]]


def test_chunks_of_an_interleaved_layout_go_round_the_stages(small):
    config = small.override(PP2, layout("Et|t|t|tmL"), "model.mtp_num_layers=1")
    assert config.finalize(4).model.virtual_pipeline_model_parallel_size == 2
    assert held(config) == [
        [([0], True, 0, False), ([2], False, 0, False)],
        [([1], False, 0, False), ([3], False, 1, True)],
    ]
