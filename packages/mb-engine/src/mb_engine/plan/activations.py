# SPDX-License-Identifier: Apache-2.0
"""Tensors kept for the backward pass, layer by layer, and what recomputation leaves of them.

Counted are the storages that autograd keeps, each once; parameters are not. How the counts follow
from the model is written down next to each tensor in :mod:`mb_engine.plan.torch_activations` and
:mod:`mb_engine.plan.te_activations`.

Source: the accounting of Korthikanti et al. 2022, arXiv:2205.05198, section 4, taken anew for the
operations that these layers use.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from attrs import frozen
from mb_config.pipeline import stage_chunks

from mb_engine.plan import te_activations, torch_activations
from mb_engine.plan.layout import expert_layers, windowed_layers
from mb_engine.plan.memory import BYTES
from mb_engine.plan.saved import Saved
from mb_engine.plan.sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mb_config import ConfigContainer

    from mb_engine.plan.layout import Degrees

DeviceType = Literal["cpu", "cuda"]
_Layer: TypeAlias = tuple[list[Saved], list[Saved]]
_INSIDE = {
    "core_attn": ("core",),
    "mlp": ("mlp",),
    "moe": ("router", "experts", "expert_activation", "shared"),
    "shared_experts": ("shared",),
    "moe_act": ("expert_activation",),
    "layernorm": ("norm", "norm_output"),
}
"""Parts that each recomputed module drops; megatron-core's ``recompute_modules``."""


@frozen(kw_only=True)
class Segment:
    """A stretch of the model that the backward pass leaves as a whole.

    Attributes:
        kept: Bytes from its forward to its backward pass.
        again: Bytes that its recomputation brings back while its backward pass runs.
    """

    kept: float
    again: float = 0.0


@frozen(kw_only=True)
class ChunkActivations:
    """What one micro-batch leaves behind in one model chunk.

    Attributes:
        segments: In the order of the forward pass.
        shared: Bytes that all micro-batches of a rank share (rotary tables).
        by_part: Bytes kept by part of the model, for reports.
    """

    segments: tuple[Segment, ...]
    shared: float
    by_part: dict[str, float]

    @property
    def kept(self) -> float:
        """Bytes between the forward and the backward pass."""
        return sum(s.kept for s in self.segments)

    def backward_peak(self) -> float:
        """Return the most bytes held at once from the end of the forward pass on."""
        held = self.kept
        peak = held
        for segment in reversed(self.segments):
            peak = max(peak, held + segment.again)
            held -= segment.kept
        return peak


def chunk_activations(
    config: ConfigContainer,
    degrees: Degrees,
    *,
    pp_rank: int,
    chunk: int,
    spec: str,
    device: DeviceType,
) -> ChunkActivations:
    """Return what one micro-batch keeps in one model chunk.

    Args:
        config: Resolved.
        degrees: Of the job.
        pp_rank: Pipeline stage.
        chunk: Which of its chunks.
        spec: ``"torch"`` or ``"te"``.
        device: Kernels of which device; they save different tensors.
    """
    layers_of = te_activations if spec == "te" else torch_activations
    sizes = Sizes.from_config(config, degrees)
    kinds = expert_layers(config.model)
    windowed = windowed_layers(config.model)
    halves: dict[tuple[bool, bool], _Layer] = {}
    layers: list[_Layer] = []
    held = stage_chunks(config.model)[pp_rank][chunk]
    for index in held.layers:
        kind = kinds[index], windowed[index]
        if kind not in halves:
            halves[kind] = _halves(layers_of, config, degrees, sizes, kind=kind, device=device)
        layers.append(halves[kind])
    segments: list[Segment] = []
    parts: dict[str, float] = {}
    if held.embedding:
        found = list(embedding(config, degrees, sizes, device=device))
        segments.append(Segment(kept=_total(found)))
        _add(parts, found)
    segments += _layer_segments(config, sizes, degrees, layers, parts)
    if held.mtp:
        kind = kinds[-1], windowed[-1]
        if kind not in halves:
            halves[kind] = _halves(layers_of, config, degrees, sizes, kind=kind, device=device)
        ahead = list(_ahead(config, sizes, device=device))
        segments += _segments_ahead(config, sizes, ahead, halves[kind], count=held.mtp, parts=parts)
    if held.loss:
        found = list(head(config, degrees, sizes, device=device))
        segments.append(Segment(kept=_total(found)))
        _add(parts, found)
    shared = torch_activations.rotary_table(config, sizes) if spec == "torch" and layers else 0.0
    return ChunkActivations(segments=tuple(segments), shared=shared, by_part=parts)


def _halves(
    layers_of: Any,
    config: ConfigContainer,
    degrees: Degrees,
    sizes: Sizes,
    *,
    kind: tuple[bool, bool],
    device: DeviceType,
) -> _Layer:
    """Return what both halves of a layer keep that is of *kind*: with experts, with a window."""
    first = layers_of.attention_half(config, degrees, sizes, windowed=kind[1], device=device)
    second = layers_of.mlp_half(config, degrees, sizes, experts=kind[0], device=device)
    return list(first), list(second)


def _ahead(config: ConfigContainer, sizes: Sizes, *, device: DeviceType) -> Iterable[Saved]:
    """Yield what a layer that predicts further ahead keeps beside its transformer layer."""
    yield Saved("shifted token ids", "ahead", sizes.tokens * 8)
    for _ in ("of the embedding", "of the states", "at the end"):
        for saved in torch_activations.norm(config, sizes, device=device):
            yield Saved(saved.name, "ahead", saved.size)
    yield Saved("embedding beside states", "ahead", 2 * sizes.spread_hidden)


def _segments_ahead(
    config: ConfigContainer,
    sizes: Sizes,
    ahead: list[Saved],
    layer: _Layer,
    *,
    count: int,
    parts: dict[str, float],
) -> list[Segment]:
    """Return the segments of *count* layers that predict further ahead."""
    if config.recompute.recompute_granularity == "full":
        inputs = [Saved("inputs of a layer ahead", "recomputed", 2 * sizes.spread_hidden)]
        again = _total(ahead) + sum(_total(half) for half in layer)
        _add(parts, inputs * count)
        return [Segment(kept=_total(inputs), again=again)] * count
    segments = []
    for _ in range(count):
        _add(parts, ahead)
        segments.append(Segment(kept=_total(ahead)))
        segments += _selected(config, sizes, layer, parts)
    return segments


def embedding(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, device: DeviceType
) -> Iterable[Saved]:
    """Yield what the embedding keeps."""
    yield Saved("token ids", "embedding", sizes.tokens * 8)
    if degrees.tp > 1:
        yield Saved("ids of other ranks", "embedding", sizes.tokens)
    if config.model.hidden_dropout > 0:
        yield Saved("dropout mask", "embedding", dropout_mask(sizes.spread_hidden, sizes, device))


def head(
    config: ConfigContainer, degrees: Degrees, sizes: Sizes, *, device: DeviceType
) -> Iterable[Saved]:
    """Yield what the final norm, the output layer and the loss keep."""
    model = config.model
    yield from torch_activations.norm(config, sizes, device=device)
    # The states of predictions ahead lie behind those of the model.
    heads = 1 + (model.mtp_num_layers or 0)
    yield Saved("output layer input", "head", sizes.spread_hidden * heads)
    fused = model.cross_entropy_loss_fusion and model.cross_entropy_fusion_impl == "te"
    # The loss keeps probabilities in float32; Transformer Engine's writes the gradient in place.
    element = sizes.element if fused else 4
    vocabulary = (model.padded_vocab_size or 0) // degrees.tp
    logits = sizes.tokens * vocabulary
    yield Saved("log-probabilities", "head", heads * logits * element)
    if model.final_logit_softcapping:
        yield Saved("capped logits", "head", heads * logits * sizes.element)
    in_parts = degrees.tp > 1 or device == "cuda"
    yield Saved("labels", "head", heads * sizes.tokens * (9 if in_parts else 8))
    # Predictions ahead keep the weights of their losses as well.
    yield Saved("loss mask", "head", (2 * heads - 1) * sizes.tokens * 4)


def dropout_mask(activation: float, sizes: Sizes, device: DeviceType) -> float:
    """Return the bytes of a dropout mask; the CPU's has the dtype of the activation."""
    return activation if device == "cpu" else activation / sizes.element


def _layer_segments(
    config: ConfigContainer,
    sizes: Sizes,
    degrees: Degrees,
    layers: Sequence[_Layer],
    parts: dict[str, float],
) -> list[Segment]:
    recompute = config.recompute
    if recompute.recompute_granularity == "full":
        return _fully_recomputed(config, sizes, degrees, layers, parts)
    segments = []
    for layer in layers:
        segments += _selected(config, sizes, layer, parts)
    return segments


def _selected(
    config: ConfigContainer, sizes: Sizes, layer: _Layer, parts: dict[str, float]
) -> list[Segment]:
    """Return the segments of one layer, less the modules that are recomputed."""
    recompute = config.recompute
    modules: tuple[str, ...] = ()
    if recompute.recompute_granularity == "selective":
        modules = tuple(recompute.recompute_modules or ("core_attn",))
    segments = []
    for found in layer:
        kept, again = _without(found, modules, sizes)
        _add(parts, kept)
        segments.append(Segment(kept=_total(kept), again=again))
    return segments


def _fully_recomputed(
    config: ConfigContainer,
    sizes: Sizes,
    degrees: Degrees,
    layers: Sequence[_Layer],
    parts: dict[str, float],
) -> list[Segment]:
    """Return a segment a recomputed group of layers, and one a layer that keeps everything."""
    recompute = config.recompute
    group = recompute.recompute_num_layers or 1
    saved_input = sizes.spread_hidden
    if config.model.fp32_residual_connection:
        saved_input = saved_input // sizes.element * BYTES["float32"]
    if recompute.distribute_saved_activations:
        saved_input //= degrees.tp
    segments = []
    uniform = recompute.recompute_method == "uniform"
    count = len(layers) if uniform else min(group, len(layers))
    step = group if uniform else 1
    for start in range(0, count, step):
        group_of = chain.from_iterable(layers[start : min(start + step, count)])
        again = sum(_total(found) for found in group_of)
        _add(parts, [Saved("layer input", "recomputed", saved_input)])
        segments.append(Segment(kept=saved_input, again=again))
    for found in chain.from_iterable(layers[count:]):
        _add(parts, found)
        segments.append(Segment(kept=_total(found)))
    return segments


def _without(
    found: Sequence[Saved], modules: Sequence[str], sizes: Sizes
) -> tuple[list[Saved], float]:
    """Return what is kept with *modules* recomputed, and the largest thing one brings back."""
    kept, again = list(found), 0.0
    for module in modules:
        dropped = [s for s in kept if s.part in _INSIDE.get(module, ())]
        if not dropped:
            continue
        kept = [s for s in kept if s not in dropped]
        if module == "layernorm":
            # The norm's input is kept in place of what the norm itself keeps.
            inputs = sum(1 for s in dropped if s.part == "norm_output")
            kept += [Saved("norm input", "norm", sizes.spread_hidden)] * inputs
            again = max(again, _total(dropped) / max(1, inputs))
            continue
        kept += [Saved(s.name, s.part, s.input_bytes) for s in dropped if s.input_bytes]
        again = max(again, _total(dropped))
    return kept, again


def _total(found: Iterable[Saved]) -> float:
    return sum(s.size for s in found)


def _add(parts: dict[str, float], found: Iterable[Saved]) -> None:
    for one in found:
        parts[one.part] = parts.get(one.part, 0.0) + one.size
