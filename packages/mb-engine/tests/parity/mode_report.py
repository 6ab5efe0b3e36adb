# SPDX-License-Identifier: Apache-2.0
"""Run the mode table and write what was measured: ``python mode_report.py FILE.md``.

Beside the Markdown goes a JSON file of the same name. Both hold differences alone, no times, so
that two machines write much the same. The exit status is 1 if a row is out of its bound.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
from pathlib import Path

from attrs import frozen
from mb_engine.testing import run_ranks
from mode_rows import AGAINST_FP32, STEPS, TABLE, Bound, Row
from mode_training import Run, train_all

TIMEOUT_S = 900


@frozen(kw_only=True)
class Difference:
    """How far two runs are from each other, at worst over steps and ranks.

    Attributes:
        loss: Absolute.
        grad_norm: Relative.
        parameters: Relative, of the parameters' norm after the last step.
        scales: Whether every step had the same loss scale and was skipped alike.
    """

    loss: float
    grad_norm: float
    parameters: float
    scales: bool

    def within(self, bound: Bound) -> bool:
        """Whether no number is above its bound, NaN being above everything."""
        return (
            self.loss <= bound.loss
            and self.grad_norm <= bound.grad_norm
            and self.parameters <= bound.parameters
            and self.scales
        )


@frozen(kw_only=True)
class Outcome:
    """What one row gave.

    Attributes:
        row: Of the table.
        difference: To one rank in the same precision.
        to_fp32: To one rank in float32, None for a float32 row.
        fall: Of the reference's loss over the run.
        parameters_norm: After the last step.
        ranks_agree: Whether all ranks reported the same losses and norms.
        skipped: Steps that overflowed.
    """

    row: Row
    difference: Difference
    to_fp32: Difference | None
    fall: float
    parameters_norm: float
    ranks_agree: bool
    skipped: int

    def complaint(self) -> str:
        """What is wrong with the row, empty if nothing is."""
        problems = []
        if not self.difference.within(self.row.bound):
            problems.append(f"{self.difference} against one rank is not within {self.row.bound}")
        wider = self.row.wider_bound
        if wider and self.to_fp32 and not self.to_fp32.within(wider):
            problems.append(f"{self.to_fp32} against float32 is not within {wider}")
        if self.fall < self.row.learns:
            problems.append(f"the loss fell by {self.fall:.2f} alone, less than {self.row.learns}")
        if bool(self.skipped) != self.row.skips:
            problems.append(f"{self.skipped} steps were skipped")
        if not self.ranks_agree:
            problems.append("ranks reported different losses or norms")
        return "; ".join(problems)


def difference(ranks, reference, *, norm_steps=STEPS, with_scales=True):
    """Return the :class:`Difference` of what all *ranks* saw to what one rank saw."""
    worst_loss = worst_norm = worst_parameters = 0.0
    scales = True
    for seen in ranks:
        pairs = zip(seen["losses"], reference["losses"], strict=True)
        worst_loss = max([worst_loss, *(_gap(a - b) for a, b in pairs)])
        norms = list(zip(seen["norms"], reference["norms"], strict=True))
        for norm, expected in norms[:norm_steps]:
            if norm is None or expected is None:
                scales &= (norm is None) == (expected is None) or not with_scales
            else:
                worst_norm = max(worst_norm, _gap(norm / expected - 1))
        ratio = seen["parameters_norm"] / reference["parameters_norm"]
        worst_parameters = max(worst_parameters, _gap(ratio - 1))
        scales &= seen["scales"] == reference["scales"] or not with_scales
    return Difference(
        loss=worst_loss, grad_norm=worst_norm, parameters=worst_parameters, scales=scales
    )


def _gap(value):
    return abs(value) if math.isfinite(value) else math.inf


def measure(rows, *, others=(), steps=STEPS, timeout_s=TIMEOUT_S):
    """Train what *rows* need; runs on as many ranks share their processes.

    Args:
        rows: Of the table.
        others: Further runs: ranks and a ``Run`` each.
        steps: Of every run.
        timeout_s: Of the runs on as many ranks.

    Returns:
        An :class:`Outcome` a row, and what all ranks saw, by ranks and run.
    """
    wanted = {(r.ranks, Run(r.overrides, packed=r.packed)) for r in rows} | set(others)
    wanted |= {(1, Run(r.reference, packed=r.packed)) for r in rows}
    wanted |= {(1, Run(r.reference_in_fp32, packed=r.packed)) for r in rows if r.wider_bound}
    seen = {}
    for ranks in sorted({n for n, _ in wanted}):
        cases = sorted(run for n, run in wanted if n == ranks)
        by_rank = run_ranks(train_all, ranks, cases, steps, timeout_s=timeout_s)
        seen |= {(ranks, case): [r[i] for r in by_rank] for i, case in enumerate(cases)}
    return [_outcome(row, seen) for row in rows], seen


def _outcome(row, seen):
    ranks = seen[row.ranks, Run(row.overrides, packed=row.packed)]
    (reference,) = seen[1, Run(row.reference, packed=row.packed)]
    to_fp32 = None
    if row.wider_bound:
        (plain,) = seen[1, Run(row.reference_in_fp32, packed=row.packed)]
        steps = row.wider_bound.norm_steps
        to_fp32 = difference(ranks, plain, norm_steps=steps, with_scales=False)
    return Outcome(
        row=row,
        difference=difference(ranks, reference, norm_steps=row.bound.norm_steps),
        to_fp32=to_fp32,
        fall=reference["losses"][0] - reference["losses"][-1],
        parameters_norm=ranks[0]["parameters_norm"],
        skipped=ranks[0]["norms"].count(None),
        ranks_agree=all(
            r[key] == ranks[0][key] for r in ranks for key in ("losses", "norms", "scales")
        ),
    )


INTRODUCTION = (
    f"{STEPS} steps of Adam; every row trains the same weights on the same global batches as its"
    " reference, one rank in the same precision. Differences are the worst over steps and ranks: of"
    " the loss absolute, of the gradient norm and of the parameters' norm after the last step"
    " relative. Written by `nox -s parity`."
)
HEADER = (
    "| mode | ranks | precision | loss | bound | gradient norm | parameters' norm |"
    " loss against float32 | |"
)


def as_markdown(outcomes, *, title):
    lines = [f"# {title}", "", INTRODUCTION]
    kind = None
    for outcome in outcomes:
        row, found = outcome.row, outcome.difference
        if row.kind != kind:
            kind = row.kind
            lines += ["", f"## {kind}", "", HEADER, "|---" * 9 + "|"]
        plain = "" if outcome.to_fp32 is None else f"{outcome.to_fp32.loss:.1e}"
        lines.append(
            f"| {row.name} | {row.ranks} | {row.precision} | {found.loss:.1e} |"
            f" {row.bound.loss:.0e} | {found.grad_norm:.1e} | {found.parameters:.1e} | {plain} |"
            f" {outcome.complaint() and '**out of bound**'} |"
        )
    lines += ["", "## Bounds", ""]
    bounds = {o.row.bound: None for o in outcomes} | {b: None for b in AGAINST_FP32.values() if b}
    lines += [
        f"- loss {b.loss:.0e}, gradient norm {b.grad_norm:.0e}, parameters' norm"
        f" {b.parameters:.0e}: {b.reason}."
        for b in bounds
    ]
    return "\n".join([*lines, ""])


def as_json(outcomes, *, title):
    rows = [
        {
            "mode": o.row.name,
            "kind": o.row.kind,
            "ranks": o.row.ranks,
            "precision": o.row.precision,
            "overrides": [*o.row.shared, *o.row.mode],
            "loss": o.difference.loss,
            "loss_bound": o.row.bound.loss,
            "reason": o.row.bound.reason,
            "grad_norm": o.difference.grad_norm,
            "parameters": o.difference.parameters,
            "loss_against_fp32": None if o.to_fp32 is None else o.to_fp32.loss,
            "within": not o.complaint(),
        }
        for o in outcomes
    ]
    return json.dumps({"title": title, "steps": STEPS, "rows": rows}, indent=1) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("markdown", type=Path)
    parser.add_argument("--only", default="", help="rows with this in their names")
    arguments = parser.parse_args()
    torch_version = importlib.metadata.version("torch")
    megatron_version = importlib.metadata.version("megatron-core")
    title = f"Parity with one rank: megatron-core {megatron_version}, torch {torch_version}"
    outcomes, _ = measure([row for row in TABLE if arguments.only in row.name])
    arguments.markdown.write_text(as_markdown(outcomes, title=title))
    arguments.markdown.with_suffix(".json").write_text(as_json(outcomes, title=title))
    bad = [f"{o.row.name}: {o.complaint()}" for o in outcomes if o.complaint()]
    print("\n".join(bad) or f"all {len(outcomes)} modes agree with one rank")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
