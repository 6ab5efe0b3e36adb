# SPDX-License-Identifier: Apache-2.0
"""finalize derives values, is pure and idempotent, and follows what the user changes later."""

from __future__ import annotations

import copy
import math

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mb_config import ConfigContainer, ConfigError, MixedPrecisionConfig

PROPERTY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
CHOICES = {
    "model.tensor_model_parallel_size": [1, 2],
    "model.pipeline_model_parallel_size": [1, 2, 3],
    "model.virtual_pipeline_model_parallel_size": ["null", 2],
    "model.context_parallel_size": [1, 2],
    "model.sequence_parallel": ["true", "false"],
    "model.ffn_hidden_size": ["null", 128, 192],
    "model.hidden_size": [64, 128],
    "model.vocab_size": ["null", 100, 257],
    "model.num_moe_experts": ["null", 4],
    "model.bf16": ["null", "true"],
    "mixed_precision": ["null", "bf16_mixed", "fp16-mixed", "nonsense"],
    "mixed_precision.grad_reduce_in_fp32": ["false"],
    "train.micro_batch_size": [1, 2],
    "train.global_batch_size": ["null", 8, 16, 24],
    "train.rampup_batch_size": ["null", "[8, 8, 100]"],
    "train.num_microbatches": [3],
    "train.train_iters": [7, 100],
    "train.train_samples": ["null", 1000],
    "optimizer.use_distributed_optimizer": ["null", "true", "false"],
    "ddp.use_distributed_optimizer": ["null", "true"],
    "scheduler.lr_warmup_iters": [0, 3],
    "scheduler.lr_decay_iters": ["null", 50],
    "validation.eval_global_batch_size": ["null", 8],
    "dataset.type": ["mock", "text"],
    "dataset.seq_length": ["null", 32],
    "comm_overlap.overlap_p2p_comm": ["null", "true", "false"],
}
OVERRIDES = st.sampled_from([f"{k}={v}" for k, vs in CHOICES.items() for v in vs])


def outcome(config: ConfigContainer, world_size: int) -> tuple:
    """Return the resolved values and where they are from, or the violations."""
    try:
        resolved = config.finalize(world_size)
    except ConfigError as error:
        return tuple(sorted(map(str, error.violations)))
    explained = [resolved.explain(s.name) for s in attrs.fields(ConfigContainer) if s.init]
    return resolved.to_dict(), explained


class TestProperties:
    @PROPERTY
    @given(st.lists(OVERRIDES, max_size=6), st.sampled_from([1, 2, 4, 8]))
    def test_it_is_idempotent(self, small, overrides, world_size):
        try:
            resolved = small.override(*overrides).finalize(world_size)
        except ConfigError:
            return
        again = resolved.finalize(world_size)
        assert again == resolved
        assert again._origins == resolved._origins

    @PROPERTY
    @given(st.lists(OVERRIDES, max_size=6), st.sampled_from([1, 2, 4]))
    def test_it_leaves_its_argument_as_it_was(self, small, overrides, world_size):
        config = small.override(*overrides)
        before, origins = copy.deepcopy(config), copy.deepcopy(config._origins)
        outcome(config, world_size)
        assert config == before
        assert config._origins == origins

    @PROPERTY
    @given(
        st.lists(OVERRIDES, max_size=4), st.lists(OVERRIDES, max_size=4), st.sampled_from([1, 2, 4])
    )
    def test_resolving_in_between_changes_nothing(self, small, first, second, world_size):
        # override, finalize, override, finalize == override, override, finalize
        config = small.override(*first)
        try:
            resolved = config.finalize(8)
        except ConfigError:
            return
        if any(o.startswith("mixed_precision.") for o in second):
            return  # a resolved name is a section, see test_a_named_precision_can_be_refined
        late = resolved.override(*second)
        assert outcome(late, world_size) == outcome(config.override(*second), world_size)


class TestDerivedValuesFollow:
    def test_the_batch(self, small):
        resolved = small.finalize(4)
        assert (resolved.train.data_parallel_size, resolved.train.num_microbatches) == (4, 4)
        resolved.train.global_batch_size = 32
        resolved.model.tensor_model_parallel_size = 2
        again = resolved.finalize(4)
        assert (again.train.data_parallel_size, again.train.num_microbatches) == (2, 16)

    def test_widths_of_the_model(self, small):
        resolved = small.finalize(1)
        assert (resolved.model.kv_channels, resolved.model.ffn_hidden_size) == (16, 128)
        again = resolved.override("model.hidden_size=256").finalize(1)
        assert (again.model.kv_channels, again.model.ffn_hidden_size) == (64, 640)

    def test_but_what_the_user_set_stays(self, small):
        resolved = small.override("model.ffn_hidden_size=128").finalize(1)
        again = resolved.override("model.hidden_size=256").finalize(1)
        assert again.model.ffn_hidden_size == 128

    def test_and_what_the_user_sets_after_resolving_stays(self, small):
        resolved = small.finalize(1)
        resolved.model.ffn_hidden_size = 512
        again = resolved.override("model.hidden_size=256").finalize(1)
        assert again.model.ffn_hidden_size == 512

    def test_an_override_with_the_derived_value_pins_it(self, small):
        resolved = small.finalize(1).override("model.ffn_hidden_size=128")
        again = resolved.override("model.hidden_size=256").finalize(1)
        assert again.model.ffn_hidden_size == 128

    def test_the_precision(self, small):
        resolved = small.override("mixed_precision=bf16_mixed").finalize(1)
        assert resolved.model.bf16
        again = resolved.override("mixed_precision=fp16_mixed").finalize(1)
        assert (again.model.bf16, again.model.fp16, again.optimizer.fp16) == (False, True, True)
        assert (again.model.params_dtype, again.ddp.grad_reduce_in_fp32) == ("float16", False)

    def test_samples_and_tokens(self, small):
        resolved = small.override("train.train_iters=null", "train.train_samples=800").finalize(1)
        assert resolved.train.train_iters == 50
        again = resolved.override("train.global_batch_size=8").finalize(1)
        assert again.train.train_iters == 100

    def test_epochs_become_steps_by_an_override_once_the_data_is_known(self, small):
        resolved = small.override("train.train_iters=null", "train.num_epochs=2").finalize(1)
        assert resolved.train.train_iters is None
        assert resolved.scheduler.lr_decay_steps is None
        known = resolved.override("train.train_iters=9", "train.num_epochs=null").finalize(1)
        assert known.scheduler.lr_decay_steps == 9 * 16

    def test_a_named_precision_can_be_refined(self, small):
        resolved = small.override("mixed_precision=bf16_mixed").finalize(1)
        assert resolved.ddp.grad_reduce_in_fp32 is True
        resolved.mixed_precision.grad_reduce_in_fp32 = False
        again = resolved.finalize(1)
        assert again.model.bf16
        assert again.ddp.grad_reduce_in_fp32 is False

    def test_a_section_put_in_anew_counts_as_the_users(self, small):
        resolved = small.finalize(1)
        resolved.model = attrs.evolve(resolved.model, hidden_size=128, kv_channels=None)
        assert resolved.finalize(1).model.kv_channels == 32


class TestDerivedValues:
    def test_the_padded_vocabulary_is_the_same_in_every_layout(self, small):
        config = small.override("model.vocab_size=257")
        sizes = {
            config.override(f"model.tensor_model_parallel_size={tp}").finalize(4)
            .model.padded_vocab_size for tp in (1, 2, 4)
        }  # fmt: skip
        assert sizes == {384}

    @pytest.mark.parametrize(("vocab", "by", "tp"), [(100, 128, 1), (1000, 6, 4), (7, 3, 2)])
    def test_the_padded_vocabulary_is_a_multiple_of_both(self, small, vocab, by, tp):
        resolved = small.override(
            f"model.vocab_size={vocab}",
            f"model.make_vocab_size_divisible_by={by}",
            f"model.tensor_model_parallel_size={tp}",
        ).finalize(4)
        padded = resolved.model.padded_vocab_size
        assert padded % by == padded % tp == 0
        assert vocab <= padded < vocab + math.lcm(by, tp)

    def test_the_vocabulary_of_a_null_tokenizer(self, small):
        config = small.override("tokenizer.tokenizer_type='null'", "tokenizer.vocab_size=50")
        assert config.finalize(1).model.vocab_size == 50

    def test_a_batch_that_is_not_given_is_one_microbatch_a_rank(self, small):
        resolved = small.override("train.global_batch_size=null").finalize(4)
        assert (resolved.train.global_batch_size, resolved.train.num_microbatches) == (4, 1)

    def test_a_decreased_batch(self, small):
        resolved = small.override(
            "train.global_batch_size=18", "train.decrease_batch_size_if_needed=true"
        ).finalize(4)
        assert resolved.train.num_microbatches == 4
        assert resolved.scheduler.lr_decay_steps == 1600
        assert resolved.validation.eval_global_batch_size == 16

    def test_interleaved_two_stages_overlap_by_themselves(self, small):
        resolved = small.override(
            "model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"
        ).finalize(2)
        overlap = resolved.comm_overlap
        assert (overlap.overlap_p2p_comm, overlap.batch_p2p_comm) == (True, False)

    @pytest.mark.parametrize(("pp", "batched"), [(1, False), (2, True)])
    def test_plain_pipelines_batch_their_sends(self, small, pp, batched):
        resolved = small.override(f"model.pipeline_model_parallel_size={pp}").finalize(2)
        overlap = resolved.comm_overlap
        assert (overlap.overlap_p2p_comm, overlap.batch_p2p_comm) == (False, batched)

    def test_the_distributed_optimizer_is_one_switch(self, small):
        for side in ("optimizer", "ddp"):
            resolved = small.override(f"{side}.use_distributed_optimizer=true").finalize(2)
            assert resolved.ddp.use_distributed_optimizer is True
            assert resolved.optimizer.use_distributed_optimizer is True

    def test_without_mixed_precision_everything_is_float32(self, small):
        resolved = small.finalize(1)
        dtypes = (resolved.model.params_dtype, resolved.model.pipeline_dtype)
        assert dtypes == ("float32", "float32")
        assert resolved.model.bf16 is resolved.model.fp16 is resolved.optimizer.bf16 is False

    def test_bf16_on_the_model_alone_is_enough(self, small):
        resolved = small.override("model.bf16=true").finalize(1)
        assert (resolved.optimizer.bf16, resolved.model.params_dtype) == (True, "bfloat16")

    def test_float32_residuals_travel_between_stages_in_float32(self, small):
        resolved = small.override(
            "mixed_precision=bf16_mixed", "model.fp32_residual_connection=true"
        ).finalize(1)
        assert resolved.model.pipeline_dtype == "float32"

    def test_a_resolved_precision_is_a_section(self, small):
        resolved = small.override("mixed_precision=bf16_with_mxfp8_mixed").finalize(1)
        assert isinstance(resolved.mixed_precision, MixedPrecisionConfig)
        assert resolved.mixed_precision.fp8_recipe == "mxfp8"
        assert resolved.ddp.reuse_grad_buf_for_mxfp8_param_ag is True
