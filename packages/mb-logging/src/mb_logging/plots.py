# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run from its records."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mb_logging.curves import Curves
from mb_logging.encoding import read_events
from mb_logging.errors import LoggingError, require

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from os import PathLike

    from mb_config.records import Event

_TRAIN, _RATE = "#4477aa", "#777777"
_EVAL = ("#cc3311", "#228833", "#aa3377", "#ee7733")
_SMOOTH_FROM = 40  # points; fewer are no cloud


def plot_metrics(
    metrics: str | PathLike[str], picture: str | PathLike[str], *, title: str = ""
) -> None:
    """Draw loss and learning rate of a metrics file.

    Args:
        metrics: A file that the ``JSONL`` sink wrote.
        picture: The file to write; its suffix decides the format.
        title: Above the picture.

    Raises:
        LoggingError: If there is no such file, no step in it, or matplotlib is missing.
    """
    curves = curves_of(read_events(metrics))
    if not curves.train:
        raise LoggingError(f"{metrics}: no step to draw; give a file that the jsonl sink wrote")
    draw(curves, picture, title=title)


def plot_events(events: Iterable[Event], picture: str | PathLike[str], *, title: str = "") -> None:
    """Draw loss (training and every validation set) and learning rate over steps.

    Args:
        events: The records of a run, in order; see :class:`mb_logging.curves.Curves` for what
            counts where a resumed run did steps again.
        picture: The file to write; its suffix decides the format.
        title: Above the picture.

    Raises:
        LoggingError: If there is no step record, or matplotlib is missing.
    """
    curves = curves_of(events)
    if not curves.train:
        raise LoggingError("there is no step to draw: the run has reported none yet")
    draw(curves, picture, title=title)


def curves_of(events: Iterable[Event]) -> Curves:
    """Return the curves of a run's records."""
    curves = Curves()
    for event in events:
        curves.add(event)
    return curves


def draw(curves: Curves, picture: str | PathLike[str], *, title: str = "") -> None:
    """Draw *curves*; whoever looks at the file meanwhile sees the old picture or the new one.

    Raises:
        LoggingError: If matplotlib is missing, or does not know the format.
    """
    require("matplotlib", extra="plot", sink="plot")
    path = Path(picture)
    figure = _figure(curves, title)
    kind = path.suffix.removeprefix(".") or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise LoggingError(f"{path}: no picture can be of type {kind!r}; use one of {known}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(os.fspath(partial), dpi=140, format=kind)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Return a moving mean over about *span* points on each side; nan and inf count for nothing.

    ``s_i = sum_j a^|i-j| v_j / sum_j a^|i-j|`` over all points, with ``a = 1 - 2 / (span + 1)``: an
    exponential moving average that looks both ways, so that a falling curve is not drawn late.
    """
    keep = 1.0 - 2.0 / (span + 1.0)
    before = _decayed(values, keep)
    after = _decayed(values[::-1], keep)[::-1]
    result = []
    for value, (total, weight), (later_total, later_weight) in zip(
        values, before, after, strict=True
    ):
        here = (value, 1.0) if math.isfinite(value) else (0.0, 0.0)  # it is in both sums
        count = weight + later_weight - here[1]
        result.append((total + later_total - here[0]) / count if count > 0 else math.nan)
    return result


def _decayed(values: Sequence[float], keep: float) -> list[tuple[float, float]]:
    """Return the sums of values and of weights up to each point, both forgetting by *keep*."""
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = total * keep, weight * keep
        if math.isfinite(value):
            total, weight = total + value, weight + 1.0
        result.append((total, weight))
    return result


def _figure(curves: Curves, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    _draw_training(loss, curves)
    for (name, points), color in zip(curves.validation.items(), _EVAL * 99, strict=False):
        _draw_validation(loss, name, points, color)
    steps = list(curves.train)
    rate.plot(steps, [p.learning_rate for p in curves.train.values()], color=_RATE, linewidth=1.3)
    loss.set_ylabel("loss (nats per token)")
    rate.set_ylabel("learning\nrate")
    rate.set_xlabel("step")
    rate.set_ylim(bottom=0.0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    rate.locator_params(axis="y", nbins=3)
    loss.legend(frameon=False)
    figure.align_ylabels()
    if title:
        loss.set_title(title, loc="left", fontsize=11)
    for axes in (loss, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, alpha=0.25, linewidth=0.6)
        axes.margins(x=0.02)
    return figure


def _draw_training(axes: Any, curves: Curves) -> None:
    steps = list(curves.train)
    losses = [p.loss if math.isfinite(p.loss) else math.nan for p in curves.train.values()]
    if len(steps) < _SMOOTH_FROM:
        axes.plot(steps, losses, color=_TRAIN, linewidth=1.5, label="training")
    else:
        axes.plot(steps, losses, color=_TRAIN, linewidth=0.8, alpha=0.35)
        mean = smoothed(losses, span=max(5.0, len(steps) / 60))
        axes.plot(steps, mean, color=_TRAIN, linewidth=1.6, label="training, smoothed")
    broken = [s for s, loss in zip(steps, losses, strict=True) if math.isnan(loss)]
    if broken:
        axes.plot(
            broken,
            [0.02] * len(broken),
            transform=axes.get_xaxis_transform(),
            color=_EVAL[0],
            marker="x",
            markersize=5,
            linestyle="none",
            label="loss not finite",
        )


def _draw_validation(axes: Any, name: str, points: dict[int, float], color: str) -> None:
    steps = sorted(points)
    losses = [points[s] for s in steps]
    axes.plot(steps, losses, color=color, marker="o", markersize=4, linewidth=1.3, label=name)
    if math.isfinite(losses[-1]):
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            textcoords="offset points",
            xytext=(4, 8),
            ha="right",
            fontsize=9,
            color=color,
        )
