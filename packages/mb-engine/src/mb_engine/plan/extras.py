# SPDX-License-Identifier: Apache-2.0
"""What low precision, CUDA graphs and offloading change, from their definitions.

None of it was compared with a GPU; :func:`notes` says so for each, and which way it may be off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mb_config import ConfigContainer

    from mb_engine.plan.parameters import Parameter
    from mb_engine.plan.sizes import Sizes

_FP8 = 2.0
"""Bytes of an element in FP8 and once more transposed."""
_MXFP8 = 2.0 + 2 / 32
"""The same with a scale of one byte for 32 elements."""
_FP4 = 1.0 + 2 / 16
"""Two copies of half a byte, each with a scale of one byte for 16 elements."""
_ENDS = ("embedding.", "output_layer.", "mlp.router.", "gate_weight")


def extra_bytes(
    config: ConfigContainer, parameters: Sequence[Parameter], sizes: Sizes, *, layers: int
) -> float:
    """Return bytes beside state and activations: low-precision weights, buffers of graphs.

    Args:
        config: Resolved.
        parameters: Of the rank.
        sizes: Of one micro-batch.
        layers: Transformer layers of the rank.
    """
    weights = sum(p.size for p in parameters if p.row > 1 and not _is_end(p.name))
    precision = config.mixed_precision
    extra = 0.0
    if getattr(precision, "fp4", None):
        extra += weights * _FP4
    elif getattr(precision, "fp8", None):
        copies = _MXFP8 if getattr(precision, "fp8_recipe", None) == "mxfp8" else _FP8
        # Parameters that are kept in FP8 themselves need no 16-bit copy beside it.
        held = sizes.element if getattr(precision, "fp8_param", False) else 0
        extra += weights * max(0.0, copies - held)
    if config.cuda_graph.cuda_graph_impl != "none":
        # Input and output of each captured layer stay where they are.
        extra += 2 * sizes.spread_hidden * layers
    return extra


def optimizer_share(config: ConfigContainer) -> float:
    """Return the part of the optimizer's state that stays on the device."""
    offload = config.offload
    return 1.0 - offload.optimizer_offload_fraction if offload.optimizer_cpu_offload else 1.0


def is_muon_matrix(parameter: Parameter) -> bool:
    """Return whether Muon updates it, with one moment; Adam has two for all else."""
    at_the_ends = parameter.name.startswith(("embedding.", "output_layer."))
    return parameter.row > 1 and not at_the_ends


def notes(config: ConfigContainer) -> Iterator[str]:
    """Yield what in a plan was not measured, a line each."""
    precision = config.mixed_precision
    for name in ("fp8", "fp4"):
        if getattr(precision, name, None):
            yield (
                f"{name.upper()}: weights in both layouts are counted from its definition, not"
                " measured; activations are counted in 16 bits, which is more than is kept"
            )
    if config.cuda_graph.cuda_graph_impl != "none":
        yield (
            "CUDA graphs: inputs and outputs of layers are counted, not measured; the graphs' own"
            " memory pools may add to it"
        )
    if config.offload.optimizer_cpu_offload:
        yield "optimizer offload: the part on the host is left out; copies on their way are not"
    if config.offload.cpu_offloading:
        yield "activation and weight offload: counted as if all stayed on the GPU, which is more"
    if config.model.torch_compile:
        yield "torch.compile: activations are those of eager layers; fused ones keep other tensors"
    if config.optimizer.optimizer == "muon":
        yield "Muon: one moment a matrix, from its definition; not measured"


def _is_end(name: str) -> bool:
    return any(end in name for end in _ENDS)
