"""Figures over the course of training: loss against what it cost, and the clipped share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from sophia.report import numbers
from sophia.report.axes import Area, Label, frame, label_ends, label_width, log_ticks, size, title
from sophia.report.looks import Look
from sophia.report.picture import Panel, Picture
from sophia.report.reading import Record, Results, estimate, number, part, records

_CUT = 0.5  # of the run, whose fall from the initial loss is cut off: it would flatten all that follows


class Band(NamedTuple):
    """An optimizer's mean over seeds with the range of the seeds, at points of the run."""

    name: str
    look: Look
    share: np.ndarray
    """Of the run, for each point."""
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Axis(NamedTuple):
    """One of the things that a loss may be held against."""

    key: str
    """Of a run: what the whole of it took."""
    label: str
    write: Callable[[object], str]


_UNITS = {"flops": "FLOP", "seconds": "seconds"}
_TITLES = {"flops": "operations", "seconds": "time"}
_AXES = (
    Axis("tokens", "tokens", numbers.count),
    Axis("steps", "steps", numbers.count),
    Axis("flops", "FLOP, curvature included", numbers.count),
    Axis("seconds", "seconds, as timed in turn", numbers.count),
)


def loss_curves(results: Results, looks: dict[str, Look]) -> Picture | None:
    """Loss against tokens, steps, operations and time; None where nothing has run."""
    bands = [band for name in results.entries if (band := _band(results, name, looks[name])) is not None]
    if not bands:
        return None
    panels = []
    for axis in _AXES:
        scale = {band.name: _whole(results, band.name, axis.key) for band in bands}
        shown = [band for band in bands if scale[band.name]]
        if shown:
            units, scale = _in_its_unit(axis, scale)
            panels.append(
                Panel(
                    draw=partial(_draw_losses, results=results, bands=shown, scale=scale, axis=units, looks=looks),
                    description=f"Validation loss against {units.label}. At the end: " + _ends(shown),
                )
            )
    return Picture(
        name="loss-curves",
        panels=tuple(panels),
        columns=2,
        caption="Validation loss of the final runs at budget T: mean over seeds, with a band from the lowest to the "
        "highest seed. The first panel, on a logarithmic axis, also has the ends of runs at other budgets, each with a "
        "whole schedule of its own. The first part of training, in which the loss falls steeply, is cut off.",
    )


def clip_curves(results: Results, looks: dict[str, Look]) -> Picture | None:
    """The clipped share of the coordinates over the steps; None where no optimizer clips."""
    lines = {}
    for name, entry in results.entries.items():
        points = [(number(point.get("step")), number(point.get("mean"))) for point in records(entry, "clip_fraction")]
        lines[name] = [(step, mean) for step, mean in points if step is not None and mean is not None]
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None
    ends = ", ".join(f"{name} {numbers.percent(line[-1][1])}" for name, line in lines.items())
    panel = Panel(
        draw=partial(_draw_clipped, lines=lines, looks=looks, headline=results.headline),
        description=f"Share of the coordinates that are clipped, against steps. At the end: {ends}",
    )
    return Picture(
        name="clipped",
        panels=(panel,),
        columns=1,
        caption="Share of the coordinates whose update is clipped, over the final runs at budget T (mean over seeds). "
        "Where all are clipped, Sophia is sign descent with momentum.",
    )


def _band(results: Results, name: str, look: Look) -> Band | None:
    """From the seeds that did not diverge, at the points that all of them have."""
    curves = []
    for run in results.finals(name):
        steps = number(run.get("steps"))
        points = {number(point.get("step")): number(point.get("val_loss")) for point in records(run, "curve")}
        good = {step: value for step, value in points.items() if step is not None and value is not None}
        if steps and good and number(run.get("val_loss")) is not None:
            curves.append({step / steps: value for step, value in good.items()})
    if not curves:
        return None
    shares = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(shares) < 2:
        return None
    values = np.array([[curve[share] for share in shares] for curve in curves])
    return Band(name, look, np.array(shares), values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def _whole(results: Results, name: str, key: str) -> float | None:
    """What the final runs of an optimizer took, on the average."""
    found = [value for run in results.finals(name) if (value := number(run.get(key))) is not None]
    return sum(found) / len(found) if found else None


def _in_its_unit(axis: Axis, scale: dict[str, float | None]) -> tuple[Axis, dict[str, float | None]]:
    """Large times and operations in a unit of which there are few, so that ticks are round and short."""
    most = max(value for value in scale.values() if value is not None)
    unit, name = 1.0, ""
    if axis.key == "seconds" and most >= 180:
        unit, name = (60.0, "minutes") if most < 10_800 else (3600.0, "hours")
    elif axis.key == "flops":
        unit, name = numbers.operations_unit(most)
    if not name:
        return axis, scale
    scaled = {optimizer: None if value is None else value / unit for optimizer, value in scale.items()}
    return axis._replace(label=axis.label.replace(_UNITS[axis.key], name)), scaled


def _ends(bands: Sequence[Band]) -> str:
    return ", ".join(f"{band.name} {numbers.loss(float(band.mean[-1]))}" for band in bands)


def _draw_losses(
    area: Area,
    *,
    results: Results,
    bands: Sequence[Band],
    scale: dict[str, Any],
    axis: Axis,
    looks: dict[str, Look],
) -> None:
    axes = frame(area, left=0.5, right=label_width([band.name for band in bands]))
    title(axes, f"Loss against {_TITLES.get(axis.key, axis.key)}", left=0.5)
    axes.set_xlabel(axis.label)
    ends = _other_budgets(results, looks) if axis.key == "tokens" else []
    _limit(axes, bands, scale, ends, logarithmic=bool(ends))
    labels = []
    for band in bands:
        x = band.share * scale[band.name]
        seen = band.share > 0
        style = {"color": band.look.color, "linestyle": band.look.linestyle, "linewidth": band.look.linewidth}
        axes.fill_between(x[seen], band.low[seen], band.high[seen], color=band.look.color, alpha=0.16, linewidth=0)
        axes.plot(x[seen], band.mean[seen], **style)
        axes.plot(x[-1:], band.mean[-1:], marker=band.look.marker, color=band.look.color, markersize=4.5)
        labels.append(
            Label(band.name, band.look.color, float(x[-1]), float(band.mean[-1]), band.name == results.headline)
        )
    for look, tokens, value, _ in ends:
        axes.plot([tokens], [value], marker=look.marker, markersize=5, color=look.color, markerfacecolor="none")
    label_ends(axes, labels)
    _write_ticks(axes, axis, logarithmic=bool(ends))


def _limit(axes: Axes, bands: Sequence[Band], scale: dict[str, Any], ends: Sequence[Any], *, logarithmic: bool) -> None:
    later = np.concatenate([band.mean[band.share >= _CUT] for band in bands])
    lowest = min(float(band.low[-1]) for band in bands)
    least = min([lowest, *(value for _, _, value, _ in ends)])
    most = float(np.quantile(later, 0.97))
    margin = 0.05 * (most - least) or 0.05
    axes.set_ylim(least - margin, most + margin)
    right = max([*(scale[band.name] for band in bands), *(tokens for _, tokens, _, _ in ends)])
    left = 0.8 * _CUT * min(scale[band.name] for band in bands)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(left, right * 1.12)
    else:
        axes.set_xlim(left, right + 0.02 * (right - left))


def _write_ticks(axes: Axes, axis: Axis, *, logarithmic: bool) -> None:
    if logarithmic:
        axes.set_xticks(log_ticks(*axes.get_xlim(), 5))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins=max(2, min(4, int(size(axes)[0] // 35))), integer=axis.key == "steps")
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: axis.write(value) if value else "0"))


def _other_budgets(results: Results, looks: dict[str, Look]) -> list[tuple[Look, float, float, str]]:
    """Ends of runs at other budgets than T, at the common batch."""
    found = []
    for point in records(results.record, "baseline_curve"):
        tokens, loss = number(point.get("tokens")), estimate(point, "loss")
        common = number(point.get("tokens_per_step")) == results.tokens_per_step
        if tokens and loss and common and tokens != results.tokens and results.baseline in looks:
            found.append((looks[results.baseline], tokens, loss.value, results.baseline))
    for name, entry in results.entries.items():
        test: Record = part(entry, "paper_test")
        tokens, loss = number(test.get("tokens")), estimate(test, "loss")
        if tokens and loss and tokens != results.tokens:
            found.append((looks[name], tokens, loss.value, name))
    return found


def _draw_clipped(
    area: Area, *, lines: dict[str, list[tuple[float, float]]], looks: dict[str, Look], headline: str
) -> None:
    axes = frame(area, left=0.55, right=label_width(list(lines)))
    title(axes, "Clipped coordinates", left=0.55)
    axes.set_xlabel("steps")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0, max(line[-1][0] for line in lines.values()))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for name, line in lines.items():
        look = looks[name]
        steps, shares = zip(*line, strict=True)
        axes.plot(
            steps,
            shares,
            color=look.color,
            linestyle=look.linestyle,
            linewidth=look.linewidth,
            marker=look.marker,
            markersize=3.5,
            markevery=max(1, len(line) // 8),
        )
    label_ends(axes, [Label(name, looks[name].color, *line[-1], name == headline) for name, line in lines.items()])
