# SPDX-License-Identifier: Apache-2.0
"""What was measured as markdown: a table a state, and every target with what came of it."""

from __future__ import annotations

import statistics
from typing import Any

from attrs import field, frozen

from contenders.checkpoint_states import SIZES, nbytes_of
from contenders.checkpointers import (
    DCP,
    DCP_ASYNC,
    DCP_PROCESS,
    DCP_THREAD,
    DISK,
    MEMCPY,
    OURS,
    OURS_BOTH,
    OURS_LAZY,
    OURS_PROCESS,
)

Found = dict[str, dict[str, dict[str, list[dict[str, float]]]]]
"""Samples by state, part of the run, and contender: one a round."""

STALL_S = 0.020
MEMORY_BYTES = 64 << 20
OTHERS = ("small", "10,000")

_A_TENSOR = (
    "a microsecond a tensor to call its copy, and a third of one to see that only values changed; "
    "with two ranks seven microseconds a DTensor"
)
_MEMORY = "a memcpy of as many bytes takes nearly as long"
_CORES = "the copy and the checksums have no core of their own beside the loop"
WHY = {
    ("blocking", "small"): _A_TENSOR,
    ("blocking", "10,000"): _A_TENSOR,
    ("blocking", "big"): _MEMORY,
    ("loop", "big"): _CORES,
    ("stall", "big"): _CORES,
}
"""Causes of misses that are known, by figure and state."""


@frozen(kw_only=True)
class Target:
    """One figure to reach.

    Attributes:
        what: In words.
        state: Of which state.
        part: Of which part of the run.
        figure: Which of its seconds.
        ours, other: Contenders; the ratio of the first to the second counts.
        most: Largest ratio.
        other_part: Where *other* was measured, if elsewhere.
    """

    what: str
    state: str
    part: str
    figure: str
    most: float
    other: str
    ours: str = OURS
    other_part: str = field(default="")

    def reached(self, found: Found) -> tuple[float, float, float] | None:
        """Return the ratio and both medians; None if it was not measured."""
        samples = found.get(self.state)
        if samples is None or self.part not in samples:
            return None
        mine = [s[self.figure] for s in samples[self.part][self.ours]]
        theirs = [s[self.figure] for s in samples[self.other_part or self.part][self.other]]
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        return statistics.median(ratios), statistics.median(mine), statistics.median(theirs)


def targets() -> list[Target]:
    """Return all targets that are ratios of times."""
    found = []
    both = ("save, 1 rank", "save, 2 ranks")
    for part in both:
        for state in SIZES:
            found += [
                Target(what="blocking, eager", state=state, part=part, figure="blocking", most=1.3,
                       other=MEMCPY),
                Target(what="blocking, eager", state=state, part=part, figure="blocking", most=0.25,
                       other=DCP_ASYNC),
            ]  # fmt: skip
    for state in SIZES:
        found.append(
            Target(what="blocking, lazy, of a running loop", state=state, part="loop",
                   figure="blocking", most=0.2, other=MEMCPY, ours=OURS_LAZY, other_part="loop")
        )  # fmt: skip
    for state, durable, cold in (("big", 0.6, 0.35), *((s, 0.15, 0.15) for s in OTHERS)):
        for part in both:
            found.append(
                Target(what="durable", state=state, part=part, figure="durable", most=durable,
                       other=DCP)
            )  # fmt: skip
        for part in ("load, 1 rank", "load, 2 ranks"):
            found.append(
                Target(what="cold load", state=state, part=part, figure="seconds", most=cold,
                       other=DCP)
            )  # fmt: skip
        for part in ("load, 2 to 1", "load, 1 to 2"):
            found.append(
                Target(what="cold load", state=state, part=part, figure="seconds", most=0.5,
                       other=DCP)
            )  # fmt: skip
    return found


def render(machine: dict[str, Any], rounds: int, results: Found, memory: dict[str, Any]) -> str:
    """Return all of it."""
    about, found = machine, results
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    parts = [
        "# Saving and loading checkpoints\n",
        (
            f"{about['cpu']}, {about['cores']} cores; {about['system']}, Python {about['python']}, "
            f"{versions}; {about['date']}, load of the machine from {min(about['loads'])} to "
            f"{max(about['loads'])}. Medians of {rounds} rounds in which all took turns, "
            "milliseconds; one thread a rank. Ratios are medians of the ratios within a round. Other "
            "work hits all alike, so ratios are the evidence and times are not; above a load of 2, "
            "the benchmark's own, even ratios spread widely.\n"
        ),
        _targets(found, memory),
    ]
    for state, samples in found.items():
        count = sum(n for n, _ in SIZES[state])
        parts.append(f"## {state}: {count:,} tensors, {nbytes_of(state) / 1e6:,.1f} MB\n")
        parts += [_saves(samples), _loads(samples)]
        parts += [_loop(samples["loop"])] if "loop" in samples else []
    for state, grown in memory.items():
        parts.append(_memory(state, grown))
    return "\n".join(parts)


def _targets(found: Found, memory: dict[str, Any]) -> str:
    lines = [
        "## Targets\n",
        "| | state | where | ratio | to reach | |",
        "|---|---|---|---|---|---|",
    ]
    for target in targets():
        reached = target.reached(found)
        if reached is None:
            continue
        ratio, mine, theirs = reached
        how = f"{1e3 * mine:.1f} against {1e3 * theirs:.1f} ms of {target.other}"
        lines.append(
            f"| {target.what} | {target.state} | {target.part}: {how} | {ratio:.2f} "
            f"| {target.most} | {_verdict(ratio, target.most, target.figure, target.state)}"
            f"{_disk(target, found) if ratio > target.most else ''} |"
        )
    for state, samples in found.items():
        lines += _loop_targets(state, samples["loop"]) if "loop" in samples else []
    for state, grown in memory.items():
        for name in (n for n in (OURS, OURS_LAZY, OURS_PROCESS) if n in grown):
            over = grown[name]["growth"] - grown[name]["state"]
            lines.append(
                f"| host memory beside one staging copy, {name} | {state} | saves | "
                f"{over / 2**20:.0f} MB | 64 MB | {_verdict(over, MEMORY_BYTES)} |"
            )
    return "\n".join(lines) + "\n"


def _disk(target: Target, found: Found) -> str:
    """Return what part of the other's time the disk alone takes, where that is what counts."""
    samples = found[target.state][target.part]
    if target.figure not in ("durable", "seconds") or DISK not in samples:
        return ""
    pairs = zip(samples[DISK], samples[target.other], strict=True)
    ratio = statistics.median(a[target.figure] / b[target.figure] for a, b in pairs)
    return f"; the disk alone takes {ratio:.2f}"


def _loop_targets(state: str, loop: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the rows of what a save costs a loop, against the best of DCP's modes."""
    lost = {name: _median(rows, "lost") for name, rows in loop.items() if name != MEMCPY}
    modes = [name for name in (DCP_ASYNC, DCP_THREAD, DCP_PROCESS) if name in lost]
    best = min(modes, key=lambda name: lost[name])
    ours = [name for name in (OURS, OURS_LAZY, OURS_PROCESS, OURS_BOTH) if name in lost]
    lines = []
    for name in ours:
        ratio = lost[name] / lost[best]
        lines.append(
            f"| time lost by a loop, {name} | {state} | {1e3 * lost[name]:.0f} against "
            f"{1e3 * lost[best]:.0f} ms of {best} | {ratio:.2f} | 0.3 | "
            f"{_verdict(ratio, 0.3, 'loop', state)} |"
        )
    floor = _median(loop["no save"], "stall")
    for name in ours:
        stall = _median(loop[name], "stall")
        lines.append(
            f"| longest stall of a micro-batch, {name} | {state} | without a save "
            f"{1e3 * floor:.1f} ms | {1e3 * stall:.1f} ms | 20 ms | "
            f"{_verdict(stall, STALL_S, 'stall', state)} |"
        )
    return lines


def _verdict(value: float, most: float, figure: str = "", state: str = "") -> str:
    if value <= most:
        return "hit"
    why = WHY.get((figure, state))
    return f"missed, {value / most:.2f} times as much{f': {why}' if why else ''}"


def _median(rows: list[dict[str, float]], figure: str) -> float:
    return statistics.median(row[figure] for row in rows)


def _saves(samples: dict[str, Any]) -> str:
    parts = [name for name in samples if name.startswith("save")]
    names = list(dict.fromkeys(name for part in parts for name in samples[part]))
    head = "".join(f" {p.removeprefix('save, ')}: blocking | of memcpy | durable |" for p in parts)
    lines = [f"| saving |{head}", "|---" * (1 + 3 * len(parts)) + "|"]
    for name in names:
        cells = ""
        for part in parts:
            rows = samples[part].get(name)
            if rows is None:
                cells += " - | - | - |"
                continue
            copies = [row["blocking"] for row in samples[part][MEMCPY]]
            ratio = statistics.median(r["blocking"] / c for r, c in zip(rows, copies, strict=True))
            durable = "-" if name == MEMCPY else f"{1e3 * _median(rows, 'durable'):.1f}"
            cells += f" {1e3 * _median(rows, 'blocking'):.1f} | {ratio:.2f} | {durable} |"
        lines.append(f"| {name} |{cells}")
    return "\n".join(lines) + "\n"


def _loads(samples: dict[str, Any]) -> str:
    parts = [name for name in samples if name.startswith("load")]
    if not parts:
        return ""
    names = list(dict.fromkeys(name for part in parts for name in samples[part]))
    head = "".join(f" {p.removeprefix('load, ')} |" for p in parts)
    lines = [f"| cold load |{head}", "|---" * (1 + len(parts)) + "|"]
    for name in names:
        cells = "".join(
            f" {1e3 * _median(samples[part][name], 'seconds'):.1f} |"
            if name in samples[part]
            else " - |"
            for part in parts
        )
        lines.append(f"| {name} |{cells}")
    return "\n".join(lines) + "\n"


def _loop(loop: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| saving from a loop | blocked | lost in all | longest stall of a micro-batch | durable |",
        "|---|---|---|---|---|",
    ]
    for name, rows in loop.items():
        cells = [
            f"{1e3 * _median(rows, figure):.1f}" if figure in rows[0] else "-"
            for figure in ("blocking", "lost", "stall", "durable")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _memory(state: str, grown: dict[str, dict[str, float]]) -> str:
    lines = [
        f"## Memory: {state}\n",
        "| saving | most memory beside the state, MB | of the state's bytes |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['growth'] / 2**20:.0f} | {row['growth'] / row['state']:.2f} |"
        for name, row in grown.items()
    ]
    return "\n".join(lines) + "\n"
