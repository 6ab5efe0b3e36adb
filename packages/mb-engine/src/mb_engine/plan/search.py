# SPDX-License-Identifier: Apache-2.0
"""Layouts that fit a number of GPUs, best first by :mod:`mb_engine.plan.cost`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen
from mb_config import CommOverlapConfig, RecomputeConfig
from mb_config.errors import ConfigError
from mb_config.pipeline import stage_chunks as chunks_of_stages

from mb_engine.errors import EngineError
from mb_engine.plan.cost import StepTime, least_time, step_time
from mb_engine.plan.hardware import Gpu, gpu_named
from mb_engine.plan.layouts import layouts
from mb_engine.plan.memory import (
    gradient_bytes,
    optimizer_bytes_per_element,
    parameter_bytes,
    stage_state,
    state_memory,
)
from mb_engine.plan.parameters import chunk_parameters
from mb_engine.plan.ranks import (
    Plan,
    layer_spec,
    plan_resolved,
    stage_activations,
    stage_chunks,
    with_vocabulary,
)
from mb_engine.plan.refusals import refuse_unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mb_config import ConfigContainer

    from mb_engine.plan.layout import Degrees
    from mb_engine.plan.memory import StageState

MICRO_BATCH_SIZES = (1, 2, 4, 8)


@frozen(kw_only=True)
class Candidate:
    """A layout that fits.

    Attributes:
        overrides: What to add to the configuration, as on the command line.
        plan: What it needs.
        time: What a step is estimated to take.
    """

    overrides: tuple[str, ...]
    plan: Plan
    time: StepTime


def search(
    config: ConfigContainer, *, gpus: int, gpu: str | Gpu, keep: int = 10
) -> tuple[Candidate, ...]:
    """Return layouts that ``finalize`` accepts and that fit, the fastest first.

    Searched are tensor, pipeline, virtual pipeline, context and expert parallelism, recomputation
    and the micro-batch size; sequence parallelism goes with tensor parallelism, the distributed
    optimizer with its overlaps with data parallelism. All else stays as *config* has it, the
    global batch size too.

    Args:
        config: What to train; its own layout is replaced.
        gpus: Ranks of the job.
        gpu: Which GPU, by name or as a record.
        keep: How many to return at most.

    Raises:
        ConfigError: If the configuration cannot be used in any layout, or is not modelled.
        EngineError: If there is no such GPU, or no layout fits.
    """
    found = gpu_named(gpu) if isinstance(gpu, str) else gpu
    plain = _on_one_replica(with_vocabulary(config), gpus)
    refuse_unknown(plain)
    accepted = _fastest(plain, gpus, found, keep=keep)
    if not accepted:
        raise EngineError(
            f"gpus={gpus}: no layout of this model fits {found.name} with"
            f" train.global_batch_size={plain.train.global_batch_size}; use more or larger GPUs, or"
            " another train.global_batch_size"
        )
    resets = _resets(config)
    return tuple(
        attrs.evolve(candidate, overrides=_over(resets, candidate.overrides))
        for candidate in accepted
    )


def _over(resets: Mapping[str, str], overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Return *overrides* after those *resets* that they do not repeat."""
    given = {text.split("=")[0] for text in overrides}
    return (*(text for field, text in resets.items() if field not in given), *overrides)


_LAYOUT = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
    "context_parallel_size": 1,
    "cp_comm_type": None,
    "hierarchical_context_parallel_sizes": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "sequence_parallel": False,
}


_PLAIN: dict[str, dict[str, Any]] = {
    "model": _LAYOUT,
    "optimizer": {"use_distributed_optimizer": None, "overlap_param_gather": None},
    "ddp": {
        "use_distributed_optimizer": None,
        "overlap_param_gather": None,
        "overlap_grad_reduce": False,
    },
}


def _on_one_replica(config: ConfigContainer, gpus: int) -> ConfigContainer:
    """Return *config*, resolved without any model parallelism.

    The global batch has to be a number that data parallelism over all GPUs need not divide.
    """
    batch = config.train.global_batch_size or gpus
    single = config.override(
        *_resets(config).values(),
        "train.micro_batch_size=1",
        f"train.global_batch_size={batch}",
    )
    return single.finalize(1)


def _resets(config: ConfigContainer) -> dict[str, str]:
    """Return, by field, the overrides that take the layout out of *config*."""
    found = {}
    for section, values in _PLAIN.items():
        for name, value in values.items():
            if getattr(getattr(config, section), name) != value:
                found[f"{section}.{name}"] = f"{section}.{name}={_word(value)}"
    for name, plain in (("recompute", RecomputeConfig()), ("comm_overlap", CommOverlapConfig())):
        if getattr(config, name) != plain:
            found[name] = f"~{name}"
    return found


def _word(value: object) -> str:
    return "null" if value is None else str(value).lower()


def _fastest(config: ConfigContainer, gpus: int, gpu: Gpu, *, keep: int) -> list[Candidate]:
    """Return the fastest layouts that fit.

    Layouts are looked at in the order of a bound that is below their time, so that the rest can be
    left out once *keep* faster ones are found.
    """
    bounded = sorted(
        (
            (least_time(config, layout, rows, gpu), index, rows, layout)
            for index, layout in enumerate(layouts(config, gpus, gpu))
            for rows in MICRO_BATCH_SIZES
        ),
        key=lambda entry: entry[:3],
    )
    found: list[Candidate] = []
    states: dict[Any, StageState] = {}
    too_large: set[Degrees] = set()
    for bound, _, rows, layout in bounded:
        if len(found) == keep and bound >= found[-1].time.total_s:
            break
        if layout in too_large:
            continue
        if not _state_fits(config, layout, gpu):
            too_large.add(layout)
            continue
        candidate = _least_recomputed(config, layout, rows, gpu, states)
        if candidate is None:
            continue
        enters = len(found) < keep or candidate.time.total_s < found[-1].time.total_s
        if enters and _is_accepted(config, candidate, gpus):
            found = sorted([*found, candidate], key=lambda c: c.time.total_s)[:keep]
    return found


def _is_accepted(config: ConfigContainer, candidate: Candidate, gpus: int) -> bool:
    try:
        config.override(*candidate.overrides).finalize(gpus)
    except ConfigError:
        return False
    return True


def _state_fits(config: ConfigContainer, degrees: Degrees, gpu: Gpu) -> bool:
    """Return whether parameters, gradients and optimizer state of the first stage fit."""
    model = _changed(config.model, _model_fields(degrees))
    here = apart = 0
    for held_by_chunk in chunks_of_stages(model)[0]:
        for p in chunk_parameters(model, degrees, held_by_chunk, spec="te"):
            if p.expert:
                apart += p.size
            else:
                here += p.size
    kept = optimizer_bytes_per_element(config)
    held: float = (here + apart) * (parameter_bytes(config) + gradient_bytes(config))
    held += kept * (here / (degrees.dp * degrees.cp) + apart / degrees.edp)
    return held <= gpu.usable_bytes


def _least_recomputed(
    config: ConfigContainer,
    degrees: Degrees,
    rows: int,
    gpu: Gpu,
    states: dict[Any, StageState],
) -> Candidate | None:
    """Return the layout with as little recomputation as fits, None if none does."""
    batch = config.train.global_batch_size or 0
    count = batch // (rows * degrees.dp)
    if count * rows * degrees.dp != batch or (degrees.vpp > 1 and count % degrees.pp):
        return None
    *others, most = _recomputations(config)
    if not _fits(_configured(config, degrees, rows, count, most), degrees, gpu, states):
        return None
    for recompute in (*others, most):
        candidate = _configured(config, degrees, rows, count, recompute)
        if recompute is most or _fits(candidate, degrees, gpu, states):
            made = plan_resolved(candidate, gpu=gpu)
            if made.fits:
                overrides = _overrides(degrees, rows, recompute)
                return Candidate(overrides=overrides, plan=made, time=step_time(made, gpu))
    return None


def _fits(
    config: ConfigContainer, degrees: Degrees, gpu: Gpu, states: dict[Any, StageState]
) -> bool:
    """Return whether the first and the last stage fit, where memory is fullest."""
    spec = layer_spec(config, "cuda")
    for pp_rank in {0, degrees.pp - 1}:
        key = degrees, pp_rank
        if key not in states:
            states[key] = stage_state(config, degrees, pp_rank=pp_rank, spec=spec)
        state = states[key]
        memory = state_memory(config, state, (0, 0))
        activations = stage_activations(
            config, degrees, stage_chunks(config, degrees, pp_rank, spec, "cuda"), pp_rank
        )
        if memory.total_bytes + activations > gpu.usable_bytes:
            return False
    return True


def _recomputations(config: ConfigContainer) -> list[dict[str, Any]]:
    """Return ways to recompute, the cheapest first."""
    experts = config.model.num_moe_experts and config.model.moe_layer_freq == 1
    module = "moe" if experts else "mlp"
    return [
        {},
        {"recompute_granularity": "selective", "recompute_modules": [module]},
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ]


def _overrides(degrees: Degrees, rows: int, recompute: dict[str, Any]) -> tuple[str, ...]:
    """Return a layout as overrides of a configuration."""
    fields = {f"model.{k}": v for k, v in _model_fields(degrees).items() if v != _LAYOUT[k]}
    fields["train.micro_batch_size"] = rows
    if degrees.dp * degrees.cp > 1:
        fields["ddp.use_distributed_optimizer"] = True
        fields["ddp.overlap_grad_reduce"] = True
        fields["ddp.overlap_param_gather"] = True
    fields |= {f"recompute.{k}": v for k, v in recompute.items()}
    return tuple(f"{name}={_yaml(value)}" for name, value in fields.items())


def _yaml(value: object) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else _word(value)


def _model_fields(degrees: Degrees) -> dict[str, Any]:
    experts_apart = degrees.ep > 1 or degrees.etp != degrees.tp
    return {
        "tensor_model_parallel_size": degrees.tp,
        "sequence_parallel": degrees.tp > 1,
        "pipeline_model_parallel_size": degrees.pp,
        "virtual_pipeline_model_parallel_size": degrees.vpp if degrees.vpp > 1 else None,
        "context_parallel_size": degrees.cp,
        "expert_model_parallel_size": degrees.ep,
        "expert_tensor_parallel_size": degrees.etp if experts_apart else None,
    }


def _configured(
    config: ConfigContainer,
    degrees: Degrees,
    rows: int,
    count: int,
    recompute: dict[str, Any],
) -> ConfigContainer:
    """Return *config* in one layout with what finalize would derive."""
    replicated = degrees.dp * degrees.cp > 1
    train = {
        "data_parallel_size": degrees.dp,
        "num_microbatches": count,
        "micro_batch_size": rows,
    }
    ddp = {
        "use_distributed_optimizer": replicated,
        "overlap_grad_reduce": replicated,
        "overlap_param_gather": replicated,
    }
    changed = copy.copy(config)
    changed.model = _changed(config.model, _model_fields(degrees))
    changed.train = _changed(config.train, train)
    changed.ddp = _changed(config.ddp, ddp)
    changed.comm_overlap = _changed(config.comm_overlap, {"overlap_p2p_comm": degrees.vpp > 1})
    changed.recompute = _changed(config.recompute, recompute)
    return changed


def _changed(section: Any, values: dict[str, Any]) -> Any:
    changed = copy.copy(section)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed
