# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps of a run, and how a run takes it back in any layout."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import attrs
from attrs import define
from mb_config import MixedPrecisionConfig
from mb_config.records import TensorShard

from mb_engine.errors import CheckpointMismatchError
from mb_engine.precision import quantized

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mb_config import ConfigContainer
    from mb_config.records import ProcessLayout
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

# Two runs with the same values here have the same parameters under the same names.
_MODEL_IDENTITY = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "padded_vocab_size",
    "normalization",
    "position_embedding_type",
    "gated_linear_unit",
    "activation_func",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "share_embeddings_and_output_weights",
    "num_moe_experts",
    "attention_output_bias",
    "normalize_branch_outputs",
    "layernorm_zero_centered_gamma",
    "embedding_scale",
)


@define(kw_only=True)
class TrainState:
    """Counters of a run; together with tensors and random states, all there is to resume.

    Attributes:
        step: Optimizer steps done, skipped ones included.
        consumed_samples: Samples taken from the training data: the data position.
        consumed_tokens: Tokens in them.
        skipped_steps: Steps whose update was skipped.
        seconds: Training time in all, over restarts.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0


def model_identity(config: ConfigContainer) -> dict[str, Any]:
    """Return the fields that decide which parameters a model has, and how they are used."""
    return {name: getattr(config.model, name) for name in _MODEL_IDENTITY}


def check_model_identity(config: ConfigContainer, stored: Mapping[str, Any], *, where: str) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointMismatchError: Naming each field that differs, with both values.
    """
    mine = model_identity(config)
    wrong = [
        f"model.{name}={mine[name]!r} but the checkpoint has {stored[name]!r}"
        for name in mine
        if name in stored and stored[name] != mine[name]
    ]
    if wrong:
        raise CheckpointMismatchError(
            f"{where} holds another model: {'; '.join(wrong)}; use the model section it was saved"
            " with, or another checkpoint.load"
        )


def layout_fingerprint(layout: ProcessLayout) -> dict[str, int]:
    """Return the degrees of *layout*; random states are kept a rank, for one layout."""
    names = ("world_size", "tp", "pp", "vpp", "cp", "dp", "ep")
    return {name: getattr(layout, name) for name in names}


def without_live_buffers(
    pieces: Sequence[TensorShard], model: Sequence[nn.Module]
) -> list[TensorShard]:
    """Return *pieces* with copies in place of buffers, which a forward pass may change.

    Args:
        pieces: Of the model.
        model: Its chunks on this rank.
    """
    live = {b.untyped_storage().data_ptr() for chunk in model for b in chunk.buffers()}
    return [
        attrs.evolve(piece, data=piece.data.clone())
        if piece.data.untyped_storage().data_ptr() in live
        else piece
        for piece in pieces
    ]


def rng_shards(states: Mapping[str, Tensor], *, rank: int) -> list[TensorShard]:
    """Return random states as pieces that belong to one rank alone."""
    return [
        TensorShard.whole(f"rng.rank_{rank:05d}.{name}", tensor) for name, tensor in states.items()
    ]


def scaling_history(
    config: ConfigContainer,
    layout: ProcessLayout,
    model: Sequence[nn.Module],
    *,
    stored: Mapping[str, Any] | None = None,
) -> dict[str, TensorShard]:
    """Return the state of FP8's delayed scaling by key, empty with any other precision.

    Args:
        config: Resolved.
        layout: Where this rank is.
        model: Its model chunks, without wrappers.
        stored: The plain state of the checkpoint to load from; None if it is to be saved.
    """
    mixed = config.mixed_precision
    if not isinstance(mixed, MixedPrecisionConfig) or not mixed.fp8:
        return {}
    if mixed.fp8_recipe != "delayed":
        return {}
    length = mixed.fp8_amax_history_len
    shards = quantized.history_shards(model, layout, length=length)
    if stored is None:
        return shards
    same = stored["layout"].get("ep") == layout.ep and _history_length(stored) == length
    if not same or not shards.keys() <= set(stored.get("scaling_history", ())):
        logger.warning(
            "the checkpoint has no FP8 scaling history for this model and layout: it starts anew,"
            " so the first steps differ from a run that was never interrupted"
        )
        return {}
    return shards


def _history_length(stored: Mapping[str, Any]) -> int | None:
    mixed = stored["config"].get("mixed_precision")
    return mixed.get("fp8_amax_history_len", 1) if isinstance(mixed, dict) else None


def plain_state(
    config: ConfigContainer, layout: ProcessLayout, progress: TrainState
) -> dict[str, Any]:
    """Return the part of a run's state that is the same on every rank and not a tensor."""
    return {
        "format_version": FORMAT_VERSION,
        "progress": attrs.asdict(progress),
        "layout": layout_fingerprint(layout),
        "model_identity": model_identity(config),
        "config": config.to_dict(),
    }
