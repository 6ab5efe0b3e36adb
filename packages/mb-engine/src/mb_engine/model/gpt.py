# SPDX-License-Identifier: Apache-2.0
"""The GPT model of a configuration: the chunks that this rank holds."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from attrs import fields_dict
from mb_config.errors import ConfigError, Violation
from torch.nn import functional

from mb_engine.runtime.megatron_compat import cuda_graph_fields

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import ConfigContainer
    from mb_config.records import ProcessLayout

_SECTIONS = ("model", "recompute", "offload", "cuda_graph", "comm_overlap", "mixed_precision")
_OF_THE_TORCH_LAYERS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "normalize_branch_outputs",
    "attention_output_bias",
    "rotary_base_local",
    "rope_scaling",
    "rope_scaling_factor",
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def transformer_config(config: ConfigContainer) -> Any:
    """Return megatron-core's ``TransformerConfig`` for a resolved configuration.

    Every field of the sections ``model``, ``recompute``, ``offload``, ``cuda_graph``,
    ``comm_overlap`` and ``mixed_precision`` that megatron-core knows by the same name is passed on,
    unless it is None, which leaves megatron-core's default. ``model.megatron`` comes last.

    Raises:
        ConfigError: If ``model.megatron`` names a field that the installed megatron-core does not
            have.
        EngineError: If ``model.layer_spec`` is ``te`` where it cannot run.
    """
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    from mb_engine.model.layer_specs import choose_layer_spec

    latent = config.model.multi_latent_attention
    config_class = MLATransformerConfig if latent else TransformerConfig
    known = {f.name for f in dataclasses.fields(config_class) if f.init}
    values = {
        name: value
        for section in _SECTIONS
        for name, value in _own_fields(getattr(config, section))
        if name in known and value is not None
    }
    model = config.model
    values |= _translated(model)
    # A stage's output is sent on and then only its autograd node is needed. Where sends overlap,
    # only a CUDA stream keeps the memory from being written again before it has been sent.
    values["deallocate_pipeline_outputs"] = model.pipeline_model_parallel_size > 1 and (
        torch.cuda.is_available() or not config.comm_overlap.overlap_p2p_comm
    )
    values.pop("cuda_graph_scope", None)
    values |= cuda_graph_fields(config.cuda_graph.cuda_graph_scope, known=known)
    te = choose_layer_spec(config) == "te"
    values["transformer_impl"] = "transformer_engine" if te else "local"
    values["use_te_rng_tracker"] = config.rng.te_rng_tracker
    extra = dict(model.megatron)
    _check_extra(extra, known=known)
    made = config_class(**{k: v for k, v in (values | extra).items() if k in known})
    # Megatron-core has no such fields; the torch layers read them.
    for name in _OF_THE_TORCH_LAYERS:
        setattr(made, name, getattr(model, name))
    return made


def build_model(config: ConfigContainer, layout: ProcessLayout) -> list[Any]:
    """Return the model chunks of this rank on its device, one unless stages are interleaved.

    A chunk is a ``GPTModel``, in a ``Float16Module`` where parameters have 16 bits. On the CPU, and
    with ``model.megatron.use_cpu_initialization``, the weights of the whole model depend on the
    seed alone and not on the layout; see :mod:`mb_engine.model.initialization`.

    Args:
        config: Resolved.
        layout: From :func:`mb_engine.runtime.distributed.initialize`.

    Raises:
        ConfigError: If ``model.megatron`` has a field that is not known.
        EngineError: If the layer spec cannot compute or compile what is asked for.
    """
    from megatron.core.fp8_utils import correct_amax_history_if_needed
    from megatron.core.tensor_parallel import (
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )
    from megatron.core.transformer.module import Float16Module

    from mb_engine.model.initialization import initialize_weights

    megatron_config = transformer_config(config)
    stages: list[int | None] = [None] if layout.vpp == 1 else list(range(layout.vpp))
    with warnings.catch_warnings():
        # Megatron-core deprecates some of the calls that it makes itself.
        warnings.simplefilter("ignore", DeprecationWarning)
        chunks = [_build_chunk(config, megatron_config, layout, stage) for stage in stages]
    if layout.device == "cpu" or megatron_config.use_cpu_initialization:
        initialize_weights(chunks, megatron_config, config.rng, layout)
    for chunk in chunks:
        for parameter in chunk.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunk.to(torch.device(layout.device))
    if config.model.torch_compile:
        from mb_engine.model.compiled import compile_elementwise

        compile_elementwise(chunks)
    if not (megatron_config.fp16 or megatron_config.bf16):
        return chunks
    halves = [Float16Module(megatron_config, chunk) for chunk in chunks]
    # That cast wrote the values of FP8 parameters into their scaling history.
    correct_amax_history_if_needed(halves)
    return halves


def _build_chunk(
    config: ConfigContainer, megatron_config: Any, layout: ProcessLayout, vp_stage: int | None
) -> Any:
    from mb_engine.model.embedding import scale_embedding
    from mb_engine.model.language_model import TorchGPTModel
    from mb_engine.model.layer_specs import block_spec, choose_layer_spec, multi_token_spec
    from mb_engine.model.multi_token import MultiTokenGPTModel
    from mb_engine.model.rotary_scaling import stretch_rotary

    model = config.model
    layer_spec = choose_layer_spec(config)
    spec = block_spec(megatron_config, layer_spec=layer_spec, vp_stage=vp_stage)
    chunk = (TorchGPTModel if layer_spec == "torch" else MultiTokenGPTModel)(
        config=megatron_config,
        transformer_layer_spec=spec,
        mtp_block_spec=multi_token_spec(megatron_config, layer_spec=layer_spec, vp_stage=vp_stage),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings or model.seq_length,
        pre_process=layout.pp_rank == 0 and vp_stage in (None, 0),
        post_process=layout.pp_rank == layout.pp - 1 and vp_stage in (None, layout.vpp - 1),
        parallel_output=True,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    stretch_rotary(chunk, model)
    scale_embedding(chunk, model.embedding_scale)
    return chunk


def _own_fields(section: Any) -> Iterator[tuple[str, Any]]:
    if section is not None and hasattr(type(section), "__attrs_attrs__"):
        for name in fields_dict(type(section)):
            yield name, getattr(section, name)


def _translated(model: Any) -> dict[str, Any]:
    """Return the fields that have a name here and an object in megatron-core."""
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.enums import AttnBackend

    from mb_engine.model.mlp import gelu_tanh

    activations = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": gelu_tanh,
        "relu": functional.relu,
        "squared_relu": squared_relu,
    }
    return {
        "activation_func": activations[model.activation_func],
        "q_lora_rank": model.q_lora_rank,  # None says something: queries are not compressed
        "attention_backend": AttnBackend[model.attention_backend],
        "params_dtype": _DTYPES[model.params_dtype or "float32"],
        "pipeline_dtype": _DTYPES[model.pipeline_dtype or model.params_dtype or "float32"],
    }


def _check_extra(extra: dict[str, Any], *, known: set[str]) -> None:
    from megatron.core import __version__

    violations = []
    for name in extra.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        violations.append(
            Violation(
                field=f"model.megatron.{name}",
                value=repr(extra[name]),
                rule=f"megatron-core {__version__} has no such TransformerConfig field",
                remedy=f"did you mean {near[0]}?" if near else "leave it out",
            )
        )
    if violations:
        raise ConfigError.from_violations(sorted(violations, key=lambda v: v.field))
