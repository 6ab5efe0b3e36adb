# SPDX-License-Identifier: Apache-2.0
"""Plans and layouts as text for people, and as plain data for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mb_engine.plan.ranks import Plan, RankPlan
    from mb_engine.plan.search import Candidate

_GIB = 1 << 30
_MIB = 1 << 20
_COLUMNS = (
    "parameters",
    "gradients",
    "optimizer",
    "padding",
    "activations",
    "working",
    "extra",
    "peak",
)


def as_text(plan: Plan) -> str:
    """Return a plan as a table of pipeline stages, each with its fullest rank."""
    model, train = plan.config.model, plan.config.train
    lines = [
        f"{plan.degrees.world} ranks: {describe(plan)}; {plan.layer_spec} layers on {plan.device}",
        ", ".join(
            [
                f"step: {train.global_batch_size} sequences of {model.seq_length} tokens",
                f"{train.num_microbatches} micro-batches of {train.micro_batch_size}",
                f"{plan.model_flops:.4g} model FLOPs",
                f"bubble {plan.bubble_fraction:.1%}",
            ]
        ),
        "",
    ]
    unit, name = _unit(plan.peak_bytes)
    rows = [("stage", "ranks", "layers", *(f"{column} {name}" for column in _COLUMNS))]
    for group, ranks in _stages(plan):
        sizes = memory(group)
        rows.append(
            (
                str(group.pp_rank),
                _ranges(ranks),
                str(group.layers),
                *(f"{sizes[column] / unit:.2f}" for column in _COLUMNS),
            )
        )
    lines += _table(rows)
    lines += ["", "sent by a rank in a step, largest of all stages"]
    lines += _table(_traffic_rows(plan)) if _traffic_rows(plan) else ["  nothing"]
    lines += [f"note: {text}" for text in plan.notes]
    lines += ["", _verdict(plan)]
    return "\n".join(lines)


def as_data(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data: bytes, FLOPs, seconds; every group of equal ranks."""
    return {
        "world_size": plan.degrees.world,
        "degrees": attrs.asdict(plan.degrees),
        "layer_spec": plan.layer_spec,
        "device": plan.device,
        "gpu": plan.gpu.name if plan.gpu else None,
        "usable_bytes": plan.gpu.usable_bytes if plan.gpu else None,
        "fits": plan.fits,
        "peak_bytes": plan.peak_bytes,
        "bubble_fraction": plan.bubble_fraction,
        "model_flops": plan.model_flops,
        "notes": list(plan.notes),
        "num_microbatches": plan.config.train.num_microbatches,
        "groups": [
            {
                "ranks": list(group.ranks),
                "stage": group.pp_rank,
                "layers": group.layers,
                "parameters": group.state.parameters,
                "bytes": memory(group),
                "activations_by_part": dict(group.activations_by_part),
                "sent_bytes": {t.kind: t.sent_bytes for t in group.traffic},
                "model_flops": group.model_flops,
            }
            for group in plan.groups
        ],
    }


def memory(group: RankPlan) -> dict[str, float]:
    """Return the bytes of one rank by what they are for."""
    state = group.state
    return {
        "parameters": state.parameter_bytes,
        "gradients": state.gradient_bytes,
        "optimizer": state.optimizer_bytes,
        "padding": state.padding_bytes,
        "activations": group.activation_bytes,
        "working": group.working_bytes,
        "extra": group.extra_bytes,
        "peak": group.peak_bytes,
    }


def candidates_as_text(candidates: Sequence[Candidate]) -> str:
    """Return layouts as a table, the reasons for their order as columns, then the best's overrides."""
    first = candidates[0].plan
    name = first.gpu.name if first.gpu else ""
    header = (
        "step s",
        "MFU",
        "tokens/s/GPU",
        "peak GiB",
        "layout",
        "mbs",
        "recompute",
        "compute s",
        "again s",
        "tensor s",
        "context s",
        "expert s",
        "pipeline s",
        "bubble s",
        "data s",
        "optimizer s",
    )
    rows = [header, *(_candidate_row(candidate) for candidate in candidates)]
    return "\n".join(
        [
            f"{first.degrees.world} x {name}: layouts that fit, by estimated time of a step",
            "",
            *_table(rows),
            "",
            "the first, as overrides:",
            "  " + " ".join(_quoted(text) for text in candidates[0].overrides),
        ]
    )


def candidates_as_data(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return layouts as plain data."""
    return [
        {
            "overrides": list(candidate.overrides),
            "degrees": attrs.asdict(candidate.plan.degrees),
            "peak_bytes": candidate.plan.peak_bytes,
            "time": attrs.asdict(candidate.time),
        }
        for candidate in candidates
    ]


def describe(plan: Plan) -> str:
    """Return the degrees above 1 as words, such as ``"TP8 x PP4 x DP2"``."""
    degrees = plan.degrees
    names = ["tp", "pp", "vpp", "cp", "dp", "ep"]
    if degrees.etp != degrees.tp:
        names.append("etp")
    parts = [f"{n.upper()}{getattr(degrees, n)}" for n in names if getattr(degrees, n) > 1]
    if degrees.etp != degrees.tp and degrees.etp == 1:
        parts.append("ETP1")
    return " x ".join(parts) or "no parallelism"


def _candidate_row(candidate: Candidate) -> tuple[str, ...]:
    time, plan = candidate.time, candidate.plan
    recompute = plan.config.recompute
    again: str = recompute.recompute_granularity or "none"
    if again == "selective":
        again = "+".join(recompute.recompute_modules or ["core_attn"])
    seconds = (
        time.compute_s,
        time.recompute_s,
        time.tensor_s,
        time.context_s,
        time.expert_s,
        time.pipeline_s,
        time.bubble_s,
        time.data_s,
        time.optimizer_s,
    )
    return (
        f"{time.total_s:.3g}",
        f"{time.model_flops_utilization:.1%}",
        f"{time.tokens_per_second_per_gpu:.0f}",
        f"{plan.peak_bytes / _GIB:.1f}",
        describe(plan),
        str(plan.config.train.micro_batch_size),
        again,
        *(f"{value:.3g}" for value in seconds),
    )


def _stages(plan: Plan) -> list[tuple[RankPlan, list[int]]]:
    """Return the fullest group of each stage with all the stage's ranks."""
    found: list[tuple[RankPlan, list[int]]] = []
    for stage in range(plan.degrees.pp):
        groups = [group for group in plan.groups if group.pp_rank == stage]
        ranks = sorted(rank for group in groups for rank in group.ranks)
        found.append((max(groups, key=lambda group: group.peak_bytes), ranks))
    return found


def _traffic_rows(plan: Plan) -> list[tuple[str, ...]]:
    largest: dict[str, tuple[float, int]] = {}
    for group in plan.groups:
        for one in group.traffic:
            if one.sent_bytes > largest.get(one.kind, (0.0, 0))[0]:
                largest[one.kind] = one.sent_bytes, one.ranks
    rows: list[tuple[str, ...]] = []
    for kind, (sent, ranks) in largest.items():
        unit, name = _unit(sent)
        rows.append((f"  {kind}", f"{sent / unit:.2f} {name}", f"among {ranks} ranks"))
    return rows


def _verdict(plan: Plan) -> str:
    peak = f"{plan.peak_bytes / _GIB:.2f} GiB at most on a rank"
    if plan.gpu is None:
        return f"{peak}; name a GPU to see whether it fits"
    usable = f"{plan.gpu.usable_bytes / _GIB:.2f} GiB usable of {plan.gpu.name}"
    return f"{'fits' if plan.fits else 'does NOT fit'}: {peak}, {usable}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _ranges(ranks: Sequence[int]) -> str:
    """Return ascending ranks as ranges, such as ``"0-7 16-23"``."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    parts = [f"{a}-{b}" if a != b else f"{a}" for a, b in found]
    return " ".join(parts) if len(parts) <= 4 else f"{len(ranks)} ranks"


def _unit(size: float) -> tuple[int, str]:
    return (_GIB, "GiB") if size >= _GIB / 10 else (_MIB, "MiB")


def _quoted(text: str) -> str:
    return f"'{text}'" if any(c in text for c in "[] ") else text
