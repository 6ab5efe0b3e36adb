# SPDX-License-Identifier: Apache-2.0
"""Overlap of communication that has to be set up before the model is built."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from mb_config import MixedPrecisionConfig
from packaging.version import Version

from mb_engine.precision.support import check_engine_layers

if TYPE_CHECKING:
    from mb_config import ConfigContainer


def initialize_overlap(config: ConfigContainer) -> None:
    """Make what overlapping communication needs beside process groups: TE's user buffers.

    Args:
        config: Resolved; process groups must be there.

    Raises:
        EngineError: If what was asked for needs Transformer Engine layers and these are not used,
            or another version.
    """
    from mb_engine.model.layer_specs import choose_layer_spec

    check_engine_layers(config, choose_layer_spec(config))
    overlap = config.comm_overlap
    if overlap.tp_comm_overlap:
        base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
        version = Version(importlib.metadata.version("transformer-engine"))
        base.initialize_ub(**user_buffer_arguments(config, base, version))


def user_buffer_arguments(config: ConfigContainer, base: Any, version: Version) -> dict[str, Any]:
    """Return the arguments of Transformer Engine's ``initialize_ub``.

    Args:
        config: Resolved.
        base: The module ``transformer_engine.pytorch.module.base``.
        version: That of Transformer Engine; from 2.7 on it takes modes instead of a flag for FP8.
    """
    model, overlap, mixed = config.model, config.comm_overlap, config.mixed_precision
    tokens = model.seq_length * config.train.micro_batch_size // model.context_parallel_size
    section = mixed if isinstance(mixed, MixedPrecisionConfig) else MixedPrecisionConfig()
    arguments: dict[str, Any] = {
        "shape": [tokens, model.hidden_size],
        "tp_size": model.tensor_model_parallel_size,
        "ub_cfgs": overlap.tp_comm_overlap_cfg,
        "bootstrap_backend": overlap.tp_comm_bootstrap_backend,
    }
    if version < Version("2.7"):
        return {**arguments, "use_fp8": section.fp8 is not None}
    modes = base.UserBufferQuantizationMode
    wanted = [modes.FP8 if section.fp8 else modes.NONE]
    ends = section.num_layers_at_start_in_bf16 + section.num_layers_at_end_in_bf16
    if section.fp8 and section.first_last_layers_bf16 and ends:
        wanted.append(modes.NONE)  # the layers at the ends communicate in 16 bits
    return {**arguments, "quantization_modes": wanted}
