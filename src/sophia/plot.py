"""Pictures of runs."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from sophia.race import Run

# Told apart by line style and marker too, for print without colour.
_STYLES = (
    {"color": "#5a5a5a", "linestyle": "--", "marker": "s"},
    {"color": "#0b6fb8", "linestyle": "-", "marker": "o"},
)
_SMOOTHED_STEPS = 20


def draw_race(runs: Sequence[Run], path: Path, *, tokens_per_step: int) -> Path:
    """Loss against steps and against seconds: validation as marked lines, smoothed training loss faintly behind.

    Returns:
        The path of the PNG.
    """
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        by_step, by_second = figure.subplots(1, 2, sharey=True)
        for run, style in zip(runs, _STYLES, strict=False):
            points = [point for point in run.validations if point.step]
            losses = [point.loss for point in points]
            label = f"{run.name}: {run.final_loss:.3f}"
            every = max(1, len(points) // 14)
            for axes, places in ((by_step, [p.step for p in points]), (by_second, [p.seconds for p in points])):
                axes.plot(places, losses, label=label, linewidth=1.8, markersize=4, markevery=every, **style)
            smooth = _smoothed(run.losses)
            by_step.plot(range(1, len(smooth) + 1), smooth, color=style["color"], alpha=0.25, linewidth=0.8)
        final = runs[0].final_loss
        for axes in (by_step, by_second):
            axes.axhline(final, color="#5a5a5a", linewidth=0.8, linestyle=":")
            axes.grid(alpha=0.2)
        by_step.set_xlabel(f"steps of {tokens_per_step} tokens")
        by_second.set_xlabel("seconds of training, curvature included")
        by_step.set_ylabel("validation loss (nats a token)")
        by_step.set_ylim(top=_top(runs))
        by_step.annotate(
            f"{runs[0].name}'s final loss", (0, final), xytext=(4, -12), textcoords="offset points", color="#5a5a5a"
        )
        by_second.legend(title="final validation loss", frameon=False)
        figure.suptitle("Same initial weights, same batches, each at its best learning rate")
        figure.savefig(path, dpi=130)
    return path


def _top(runs: Sequence[Run]) -> float:
    """Leave out the fall from the initial loss, which would flatten all that follows."""
    later = [point.loss for run in runs for point in run.validations[1:]]
    least = min(later)
    return least + 1.05 * min(max(later) - least, 2.5)


def _smoothed(losses: Sequence[float]) -> list[float]:
    return [
        sum(window) / len(window)
        for window in (losses[max(0, end - _SMOOTHED_STEPS) : end] for end in range(1, len(losses) + 1))
    ]
