# SPDX-License-Identifier: Apache-2.0
"""What Megatron-FSDP switches on, and what it refuses to be combined with."""

from __future__ import annotations

import pytest
from mb_config import ConfigError

FSDP = "ddp.use_megatron_fsdp=true"
MOE = "model.num_moe_experts=4"


def strategy(name):
    return f"ddp.data_parallel_sharding_strategy={name}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), ("optim_grads_params", True, True)),
        ((strategy("optim_grads_params"),), ("optim_grads_params", True, True)),
        ((strategy("optim_grads"),), ("optim_grads", True, False)),
        ((strategy("optim"), "dist.device=cpu"), ("optim", False, False)),
    ],
)
def test_a_strategy_brings_the_overlap_it_is_made_of(small, overrides, expected):
    resolved = small.override(FSDP, "dist.device=cpu", *overrides).finalize(4)
    ddp = resolved.ddp
    found = ddp.data_parallel_sharding_strategy, ddp.overlap_grad_reduce, ddp.overlap_param_gather
    assert found == expected
    assert ddp.use_distributed_optimizer
    assert resolved.optimizer.use_distributed_optimizer
    assert resolved.finalize(4) == resolved


def test_explain_says_where_the_distributed_optimizer_comes_from(small):
    resolved = small.override(FSDP).finalize(4)
    assert "use_megatron_fsdp shards its states" in resolved.explain(
        "ddp.use_distributed_optimizer"
    )


def test_without_it_nothing_is_sharded(small):
    assert small.finalize(4).ddp.data_parallel_sharding_strategy == "no_shard"


# overrides of a valid configuration, ranks, the field named, what the message says
REFUSED = [
    ([strategy("optim")], 4, "ddp.data_parallel_sharding_strategy", "no effect without"),
    (["ddp.fsdp_double_buffer=true"], 4, "ddp.fsdp_double_buffer", "no effect without"),
    (["ddp.suggested_communication_unit_size=5"], 4, "ddp.suggested_communication_unit_size",
     "no effect without"),
    ([FSDP, strategy("no_shard")], 4, "ddp.data_parallel_sharding_strategy", "shards nothing"),
    ([FSDP, "optimizer.use_distributed_optimizer=false"], 4, "ddp.use_distributed_optimizer",
     "needs it"),
    ([FSDP, "ddp.overlap_param_gather=false"], 4, "ddp.overlap_param_gather", "layer by layer"),
    ([FSDP, strategy("optim"), "ddp.fsdp_double_buffer=true"], 4, "ddp.fsdp_double_buffer",
     "needs data_parallel_sharding_strategy=optim_grads_params"),
    ([FSDP, "model.pipeline_model_parallel_size=2"], 4, "ddp.use_megatron_fsdp", "no stages"),
    ([FSDP], 1, "ddp.use_megatron_fsdp", "count gradients twice; set it to false, or start more"),
    ([FSDP, "model.tensor_model_parallel_size=2"], 2, "ddp.use_megatron_fsdp", "gradients twice"),
    ([FSDP, MOE, "model.expert_model_parallel_size=4"], 4, "ddp.use_megatron_fsdp",
     r"expert TP x EP = 4 takes all 4 ranks; lower model.expert_model_parallel_size"),
    ([FSDP, "dist.use_tp_pp_dp_mapping=true"], 4, "dist.use_tp_pp_dp_mapping", "other order"),
    ([FSDP, "ddp.num_distributed_optimizer_instances=2"], 4,
     "ddp.num_distributed_optimizer_instances", "shards over all data-parallel ranks"),
    ([FSDP, "ddp.average_in_collective=true", "model.calculate_per_token_loss=false"], 4,
     "ddp.average_in_collective", "excluded by ddp.use_megatron_fsdp"),
    ([FSDP, "ddp.check_for_nan_in_grad=true"], 4, "ddp.check_for_nan_in_grad", "excluded by"),
    ([FSDP, "ddp.check_for_large_grads=true"], 4, "ddp.check_for_large_grads", "excluded by"),
    ([FSDP, "rng.data_parallel_random_init=true"], 4, "rng.data_parallel_random_init",
     "each rank's shard as it is"),
    ([FSDP, "train.check_weight_hash_across_dp_replicas_interval=5"], 4,
     "train.check_weight_hash_across_dp_replicas_interval", "no two ranks"),
    ([FSDP, "peft.type=lora", "checkpoint.pretrained_checkpoint=x"], 4, "peft", "excluded by"),
    ([FSDP, "env_vars.CUDA_DEVICE_MAX_CONNECTIONS=1"], 4, "env_vars", "set it to 8 or more"),
    ([FSDP, "optimizer.optimizer=sgd"], 4, "optimizer.optimizer", "for adam alone"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "ranks", "named", "says"), REFUSED)
def test_what_does_not_go_together_is_refused(small, overrides, ranks, named, says):
    with pytest.raises(ConfigError, match=says) as caught:
        small.override(*overrides).finalize(ranks)
    assert named in {violation.field for violation in caught.value.violations}


def test_two_ranks_for_each_shard_of_the_experts_suffice(small):
    small.override(FSDP, MOE, "model.expert_model_parallel_size=2").finalize(4)


def test_a_mean_a_micro_batch_is_refused_with_context_parallelism(small):
    mean = "model.calculate_per_token_loss=false"
    small.override(mean).finalize(4)
    with pytest.raises(ConfigError, match="the mean of the means over parts of a sequence"):
        small.override(mean, "model.context_parallel_size=2").finalize(4)
