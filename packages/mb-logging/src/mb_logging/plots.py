# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run from its records."""

from __future__ import annotations

from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mb_config.records import EvalEvent, StepEvent

from mb_logging.encoding import read_events
from mb_logging.errors import LoggingError, require

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from os import PathLike

    from mb_config.records import Event

_TRAIN, _EVAL = "#4477aa", ("#cc3311", "#228833", "#aa3377", "#ee7733")


def plot_metrics(metrics: str | PathLike[str], picture: str | PathLike[str]) -> None:
    """Draw loss and learning rate of a metrics file.

    Args:
        metrics: A file that the ``JSONL`` sink wrote.
        picture: The file to write; its suffix decides the format.

    Raises:
        LoggingError: If there is no such file, no step in it, or matplotlib is missing.
    """
    path = Path(metrics)
    if not path.is_file():
        raise LoggingError(f"{path}: no such metrics file; give one that the jsonl sink wrote")
    plot_events(read_events(path), picture)


def plot_events(events: Iterable[Event], picture: str | PathLike[str]) -> None:
    """Draw loss (training and every validation set) and learning rate over steps.

    Where a run was resumed from an earlier step, the later record of a step counts.

    Raises:
        LoggingError: If there is no step record, or matplotlib is missing.
    """
    steps: dict[int, StepEvent] = {}
    evaluations: dict[str, dict[int, float]] = {}
    for event in events:
        if isinstance(event, StepEvent):
            steps[event.step] = event
        elif isinstance(event, EvalEvent):
            evaluations.setdefault(event.name, {})[event.step] = event.loss
    if not steps:
        raise LoggingError("there is no step to draw: the run has reported none yet")
    require("matplotlib", extra="plot", sink="plot")
    figure = _figure([steps[s] for s in sorted(steps)], evaluations)
    figure.savefig(fspath(picture), dpi=130)


def _figure(steps: Sequence[StepEvent], evaluations: dict[str, dict[int, float]]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    x = [s.step for s in steps]
    loss.plot(x, [s.loss for s in steps], color=_TRAIN, linewidth=1.4, label="training")
    for index, (name, points) in enumerate(evaluations.items()):
        at = sorted(points)
        loss.plot(
            at,
            [points[s] for s in at],
            color=_EVAL[index % len(_EVAL)],
            marker="o",
            markersize=4,
            linewidth=1.2,
            label=name,
        )
        loss.annotate(
            f"{points[at[-1]]:.3f}",
            (at[-1], points[at[-1]]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            fontsize=8,
            color=_EVAL[index % len(_EVAL)],
        )
    rate.plot(x, [s.learning_rate for s in steps], color="#555555", linewidth=1.2)
    loss.set_ylabel("loss (nats per token)")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    loss.legend(frameon=False)
    for axes in (loss, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, alpha=0.25)
    return figure
