# SPDX-License-Identifier: Apache-2.0
"""No field of the configuration is without a reader, and what is handed on by name exists there."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re

import attrs
import mb_engine
import pytest
from mb_config import ConfigContainer, MixedPrecisionConfig, ModelConfig, sections

# Read by packages that this one only finds through entry points.
READ_ELSEWHERE = {
    "CheckpointConfig": {
        "most_recent_k",
        "save_retain_interval",
        "staging",
        "writer",
        "layout",
        "compression",
        "compression_level",
        "replicate_to",
        "replica_most_recent_k",
    },
    "LoggerConfig": {"tensorboard_dir"},
    "LoRA": None,
}
SECTIONS = [c for n in sections.__all__ if attrs.has(c := getattr(sections, n))]


def _megatron_fields(module: str, *classes: str) -> set[str]:
    spec = importlib.util.find_spec("megatron.core")
    if spec is None or spec.origin is None:
        raise LookupError("megatron-core is not installed")
    tree = ast.parse((pathlib.Path(spec.origin).parent / module).read_text(encoding="utf-8"))
    return {
        item.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    }


class TestNamesAreMegatrons:
    """What is handed on by name must exist there."""

    def names(self, cls):
        return {a.name for a in attrs.fields(cls) if a.init}

    def transformer(self):
        model = _megatron_fields("model_parallel_config.py", "ModelParallelConfig")
        file = "transformer/transformer_config.py"
        return model | _megatron_fields(file, "TransformerConfig", "MLATransformerConfig")

    def test_of_the_model(self):
        ours = {
            "seq_length", "max_position_embeddings", "vocab_size", "padded_vocab_size",
            "make_vocab_size_divisible_by", "position_embedding_type",
            "share_embeddings_and_output_weights", "layer_spec", "megatron", "torch_compile",
            "attn_logit_softcapping", "final_logit_softcapping",
            "rotary_base_local", "rope_scaling", "rope_scaling_factor", "rope_low_freq_factor",
            "rope_high_freq_factor", "rope_original_max_positions", "normalize_branch_outputs",
            "embedding_scale", "attention_output_bias",
        }  # fmt: skip
        assert self.names(ModelConfig) - self.transformer() == ours

    @pytest.mark.parametrize("cls", ["CommOverlapConfig", "RecomputeConfig", "CudaGraphConfig"])
    def test_of_overlap_recomputation_and_graphs(self, cls):
        # What TE takes when its user buffers are made, which is not megatron-core's to know.
        assert self.names(getattr(sections, cls)) - {"tp_comm_overlap_cfg"} <= self.transformer()

    def test_of_offloading(self):
        optimizer = _megatron_fields("optimizer/optimizer_config.py", "OptimizerConfig")
        assert self.names(sections.OffloadConfig) <= self.transformer() | optimizer

    def test_of_the_optimizer(self):
        theirs = _megatron_fields("optimizer/optimizer_config.py", "OptimizerConfig")
        # Muon's has another name in 0.16, which has another Muon; overrides go beside the section.
        assert self.names(sections.OptimizerConfig) - {"muon_nesterov", "overrides"} <= theirs

    def test_of_data_parallelism(self):
        file = "distributed/distributed_data_parallel_config.py"
        theirs = _megatron_fields(file, "DistributedDataParallelConfig")
        assert self.names(sections.DistributedDataParallelConfig) <= theirs

    def test_of_low_precision(self):
        low = {n for n in self.names(MixedPrecisionConfig) if n.startswith(("fp8", "fp4", "num_"))}
        assert low - {"fp8_param_gather"} <= self.transformer()


def _sources():
    folder = pathlib.Path(mb_engine.__file__).parent
    return "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))


def _passed_on():
    """Return the field names that megatron-core takes over by name."""
    files = {
        "model_parallel_config.py": ["ModelParallelConfig"],
        "transformer/transformer_config.py": ["TransformerConfig", "MLATransformerConfig"],
        "optimizer/optimizer_config.py": ["OptimizerConfig"],
        "distributed/distributed_data_parallel_config.py": ["DistributedDataParallelConfig"],
    }
    return set().union(*(_megatron_fields(file, *names) for file, names in files.items()))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda c: c.__name__)
def test_every_field_is_read_by_something(section):
    elsewhere = READ_ELSEWHERE.get(section.__name__, set())
    if elsewhere is None:
        return
    source, by_name = _sources(), _passed_on()
    unread = {
        a.name
        for a in attrs.fields(section)
        if a.init and a.name not in by_name | elsewhere and not re.search(rf"\.{a.name}\b", source)
    }
    # The schedule's lengths and shares become others in finalize, which mb-config tests.
    inputs = {
        "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
        "lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples",
        "make_vocab_size_divisible_by",
    }  # fmt: skip
    assert unread - inputs == set()


def test_every_section_is_part_of_the_container():
    source = _sources()
    names = {a.name for a in attrs.fields(ConfigContainer) if a.init}
    assert {n for n in names if not re.search(rf"\b{n}\b", source)} == set()
