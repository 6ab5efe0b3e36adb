# SPDX-License-Identifier: Apache-2.0
"""The layouts that a search looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mb_engine.plan.layout import Degrees

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mb_config import ConfigContainer

    from mb_engine.plan.hardware import Gpu

MOST_CHUNKS = 6
"""More chunks a pipeline stage are not tried; each makes messages more numerous (own)."""
FEWEST_TOKENS = 2048
"""Context parallelism leaves at least so many tokens of a sequence on a rank (own)."""


def layouts(config: ConfigContainer, gpus: int, gpu: Gpu) -> Iterator[Degrees]:
    """Yield every division of the GPUs whose sizes divide the model's.

    Args:
        config: Resolved, in any layout.
        gpus: Ranks of the job.
        gpu: Which GPU; tensor parallelism stays within its machine.
    """
    model = config.model
    length = model.seq_length
    for tp in _powers(min(gpus, gpu.per_machine)):
        if not _tensor_parallel_fits(config, tp):
            continue
        for cp in _powers(gpus // tp):
            if cp > 1 and (length % (2 * cp * tp) or length // cp < FEWEST_TOKENS):
                break
            for pp in _divisors(gpus // (tp * cp), model.num_layers):
                dp = gpus // (tp * cp * pp)
                for ep, etp in _expert_degrees(config, tp, tp * cp * dp):
                    for vpp in [1, *_virtual(model.num_layers // pp, pp)]:
                        yield Degrees(
                            tp=tp,
                            cp=cp,
                            dp=dp,
                            pp=pp,
                            vpp=vpp,
                            ep=ep,
                            etp=etp,
                            edp=tp * cp * dp // (ep * etp),
                            pipeline_before_data=config.dist.use_tp_pp_dp_mapping,
                        )


def _tensor_parallel_fits(config: ConfigContainer, tp: int) -> bool:
    model = config.model
    groups = model.num_query_groups or 1
    shared = model.moe_shared_expert_intermediate_size or 0
    return (
        all(
            size % tp == 0
            for size in (
                model.num_attention_heads,
                model.hidden_size,
                model.ffn_hidden_size or 0,
                model.seq_length,
                shared,
                model.padded_vocab_size or 0,
            )
        )
        and groups % tp == 0
    )


def _expert_degrees(config: ConfigContainer, tp: int, ranks: int) -> Iterator[tuple[int, int]]:
    experts = config.model.num_moe_experts
    if not experts:
        yield 1, tp
        return
    width = config.model.moe_ffn_hidden_size or 0
    biased = config.model.add_bias_linear
    for etp in sorted({1, tp}):
        if width % etp or (biased and etp > 1):
            continue
        for ep in _powers(experts):
            if experts % ep == 0 and ranks % (ep * etp) == 0:
                yield ep, etp


def _virtual(layers: int, pp: int) -> list[int]:
    """Return numbers of chunks a stage: the fewest, and the most up to `MOST_CHUNKS`."""
    fitting = [n for n in range(2, min(layers, MOST_CHUNKS) + 1) if layers % n == 0]
    return sorted({fitting[0], fitting[-1]}) if fitting and pp > 1 else []


def _powers(most: int) -> Iterator[int]:
    value = 1
    while value <= most:
        yield value
        value *= 2


def _divisors(gpus: int, layers: int) -> list[int]:
    return [n for n in range(1, gpus + 1) if gpus % n == 0 and layers % n == 0]
