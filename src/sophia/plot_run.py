"""The picture of one training run: its loss above, what explains it below."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from sophia.metrics import FILE, RunMetrics, read_metrics

Points = tuple[list[int], list[float]]

_BLUE = "#0b6fb8"
_ORANGE = "#d1590a"
_GREY = "#5a5a5a"
_EVENTS = {"spike": ("#c9302c", "--"), "rollback": ("#7b3fa0", "-"), "skipped": ("#c9302c", ":")}  # colour and line
_OTHER_EVENT = (_GREY, "-.")
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}

_SMOOTHED_SHARE = 0.04  # of the logged steps, over which the loss is smoothed; where it falls fast, over fewer
_FALL_SHARE = 0.1  # of the steps, whose fall from the initial loss is cut off: it would flatten all that follows
_FEW = 25  # points that are marked one by one


def draw_run(run_folder: Path) -> Path:
    """Draw `loss.png` from `metrics.jsonl` and return its path.

    Raises:
        ValueError: A line of the metrics is broken.
        OSError: There are no metrics, or the picture cannot be written.
    """
    folder = Path(run_folder)
    found = read_metrics(folder / FILE)
    panels = list(_panels(found))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 5 + 1.2 * len(panels)), layout="constrained")
        heights = [4.5] + [1.0] * len(panels)
        axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
        _draw_losses(axes[0], found)
        for panel, (key, label) in zip(axes[1:], panels, strict=True):
            _draw_panel(panel, _points(found.training, key), key, label)
        _mark_events(axes, found.events)
        _describe_steps(axes[0], axes[-1], found)
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(loc="upper right")
        figure.align_ylabels(axes[1:])
        figure.suptitle(_title(folder, found), x=0.01, ha="left")
        path = folder / "loss.png"
        figure.savefig(path, dpi=130)
    return path


def _draw_losses(axes: Axes, found: RunMetrics) -> None:
    steps, losses = _points(found.training, "loss")
    if len(steps) > _FEW:
        axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(losses), color=_BLUE, linewidth=1.6, label="training, smoothed")
    elif steps:
        axes.plot(steps, losses, color=_BLUE, linewidth=1.0, marker=".", label="training")
    at, values = _points(found.evaluations, "val_loss")
    if at:
        axes.plot(at, values, color=_ORANGE, linewidth=1.0, marker="o", markersize=3.5, label="validation")
    bad = [step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
    bad += [step for step, loss in zip(at, values, strict=True) if not math.isfinite(loss)]
    if bad:
        edge = axes.get_xaxis_transform()  # steps across, the height of the panel upwards
        height = [0.985] * len(bad)
        axes.plot(bad, height, "x", color=_EVENTS["skipped"][0], transform=edge, clip_on=False, label="not finite")
    axes.set_ylabel("loss (nats a token)")
    limits = _limits([*zip(steps, losses, strict=True), *zip(at, values, strict=True)])
    if limits is not None:
        axes.set_ylim(*limits)


def _limits(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """From the least loss to the largest after the first fall; of single outliers only what lies near the others."""
    finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if not finite:
        return None
    start = _FALL_SHARE * max(step for step, _ in finite)
    later = [loss for step, loss in finite if step >= start]
    least, most = min(loss for _, loss in finite), float(np.quantile(later, 0.995))
    margin = 0.05 * (most - least) or 0.05
    return least - margin, most + 2 * margin


def _panels(found: RunMetrics) -> Iterator[tuple[str, str]]:
    """Key and label of the quantities that were measured at all."""
    for key, label in (("lr", "learning rate"), ("clip_fraction", "clipped"), ("grad_norm", "gradient norm")):
        if any(math.isfinite(value) for value in _points(found.training, key)[1]):
            yield key, label


def _draw_panel(axes: Axes, points: Points, key: str, label: str) -> None:
    steps, values = points
    axes.plot(steps, values, color=_BLUE, linewidth=1.0, marker="." if len(steps) <= _FEW else "")
    axes.set_ylabel(label, rotation=0, ha="right", va="center")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    finite = [value for value in values if math.isfinite(value)]
    if key == "clip_fraction":
        axes.set_ylim(-0.04, 1.04)
        axes.set_yticks([0, 0.5, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif key == "lr":
        axes.set_ylim(0, 1.1 * max(finite) or 1.0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    elif min(finite) > 0 and max(finite) > 20 * float(np.median(finite)):
        axes.set_yscale("log")  # one spike would flatten the rest
    else:
        axes.set_ylim(0, 1.1 * max(finite) or 1.0)


def _mark_events(axes: Sequence[Axes], events: Sequence[dict[str, Any]]) -> None:
    """A line through all panels for each event; the legend has each kind once."""
    named = set()
    alpha = max(0.15, min(0.9, 10 / max(len(events), 1)))
    for event in events:
        kind = event["event"]
        color, style = _EVENTS.get(kind, _OTHER_EVENT)
        for panel in axes:
            label = kind if panel is axes[0] and kind not in named else None
            panel.axvline(
                event["step"], color=color, linestyle=style, linewidth=1.0, alpha=alpha, label=label, zorder=0
            )
        named.add(kind)


def _describe_steps(top: Axes, bottom: Axes, found: RunMetrics) -> None:
    """Steps below, and above the tokens that they make."""
    bottom.set_xlabel("steps")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max((line["step"] for lines in (found.training, found.evaluations) for line in lines), default=0)
    bottom.set_xlim(0, 1.01 * last or 1)
    pairs = [(line["step"], line["tokens"]) for line in found.training if line.get("tokens")]
    if pairs and pairs[-1][0]:
        tokens_per_step = pairs[-1][1] / pairs[-1][0]
        tokens = top.secondary_xaxis(
            "top", functions=(lambda step: step * tokens_per_step, lambda count: count / tokens_per_step)
        )
        tokens.set_xlabel("tokens")
        engineering = EngFormatter(sep="")
        tokens.xaxis.set_major_formatter(lambda count, _: engineering(count).replace("G", "B"))  # billions


def _title(folder: Path, found: RunMetrics) -> str:
    name = folder.resolve().name
    if found.evaluations:
        last = found.evaluations[-1]
        return f"{name}: validation loss {last['val_loss']:.4f} after {last['step']} steps"
    if found.training:
        last = found.training[-1]
        return f"{name}: training loss {last['loss']:.4f} at step {last['step']}, no evaluation"
    return f"{name}: nothing was measured"


def _points(records: Sequence[dict[str, Any]], key: str) -> Points:
    """Steps and values of one quantity; NaN, where it was not finite, leaves a gap in a line."""
    pairs = [(record["step"], float(record[key])) for record in records if key in record]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over a window around each point, so that it does not lag behind; what is not finite is passed over."""
    values = np.array(losses)
    good = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(good, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(good)))
    places = np.arange(len(values))
    # Narrow at the beginning, where the loss falls faster than a window is wide.
    reach = np.minimum(places // 8, round(_SMOOTHED_SHARE * len(values) / 2))
    ends, begins = np.minimum(places + reach + 1, len(values)), places - reach
    with np.errstate(invalid="ignore"):
        mean: list[float] = ((sums[ends] - sums[begins]) / (counts[ends] - counts[begins])).tolist()
    return mean
