"""The figure that shows what a speed-up is: the baseline's loss over budgets, and where the others' losses meet it."""

from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from sophia.report import numbers
from sophia.report.axes import Area, Label, frame, label_ends, label_width, short, title
from sophia.report.looks import MUTED, Look
from sophia.report.picture import Panel, Picture
from sophia.report.reading import Estimate, Results, estimate, number, records


class Budget(NamedTuple):
    """The baseline at one budget."""

    tokens: float
    loss: Estimate


def budgets(results: Results, looks: dict[str, Look]) -> Picture | None:
    """The baseline's L(D) with the others at T; None where the baseline has no two budgets yet."""
    lines = _by_batch(results)
    common = lines.get(results.tokens_per_step or 0.0, [])
    if not common or not results.tokens or results.baseline not in looks:
        return None
    read = ", ".join(f"{numbers.budget(b.tokens, results.tokens)} {numbers.loss(b.loss.value)}" for b in common)
    panel = Panel(
        draw=partial(_draw, results=results, looks=looks, lines=lines),
        description=f"Final loss of {results.baseline} against its budget: {read}. Losses of the other optimizers at "
        "T, and the budget at which the baseline reaches each.",
        height=3.3,
    )
    return Picture(
        name="budgets",
        panels=(panel,),
        columns=1,
        caption=f"How a speed-up is read off. The line is {results.baseline}'s final loss over budgets, each point "
        "from runs with a whole schedule of their own (vertical bars: 95 % intervals). From an optimizer's loss at "
        f"budget T go across to the line: there {results.baseline} reaches that loss, and its budget divided by T is "
        "the speed-up in tokens. Between budgets the loss is interpolated linearly in log D; beyond them there is only "
        "a bound.",
    )


def _by_batch(results: Results) -> dict[float, list[Budget]]:
    found: dict[float, list[Budget]] = {}
    for point in records(results.record, "baseline_curve"):
        tokens, loss, batch = number(point.get("tokens")), estimate(point, "loss"), number(point.get("tokens_per_step"))
        if tokens and loss and batch:
            found.setdefault(batch, []).append(Budget(tokens, loss))
    return {batch: sorted(points) for batch, points in found.items() if len(points) > 1}


def _draw(area: Area, *, results: Results, looks: dict[str, Look], lines: dict[float, list[Budget]]) -> None:
    whole = results.tokens
    assert whole
    common = lines[results.tokens_per_step or 0.0]
    met = {name: entry for name, entry in results.entries.items() if name != results.baseline}
    losses = {name: loss for name, entry in met.items() if (loss := estimate(entry, "final_loss")) is not None}
    texts = {name: f"{name} {numbers.speedup(estimate(met[name], 'speedup_tokens'))}" for name in losses}
    axes = frame(area, left=0.5, right=label_width([*texts.values(), results.baseline]), bottom=0.58)
    title(axes, f"Final loss against {short(results.baseline)}'s budget", left=0.5)
    axes.set_xlabel(f"budget D of {results.baseline}, tokens")
    _limit(axes, common, [loss.value for loss in losses.values()])
    axes.set_xticks(
        [point.tokens for point in common],
        [f"{numbers.budget(point.tokens, whole)}\n{numbers.count(point.tokens)}" for point in common],
    )
    axes.xaxis.set_minor_locator(NullLocator())
    labels = []
    for name, loss in losses.items():
        strong = name == results.headline
        end = _draw_reading(
            axes, common, whole, loss, estimate(met[name], "speedup_tokens"), looks[name], strong=strong
        )
        labels.append(Label(texts[name], looks[name].color, end, loss.value, strong))
    _draw_baseline(axes, lines, results, looks)
    last = common[-1]
    inside = axes.get_ylim()[0] <= last.loss.value <= axes.get_ylim()[1]
    if inside:
        labels.append(Label(results.baseline, looks[results.baseline].color, last.tokens, last.loss.value))
    label_ends(axes, labels)


def _limit(axes: Axes, common: list[Budget], losses: list[float]) -> None:
    reached = [point.loss.value for point in common]
    low = min([*reached, *losses])
    # A loss far above the shortest budget's would flatten the line: it is beyond the figure, and said in the table.
    high = min(max([*reached, *losses]), max(reached) + 0.5 * (max(reached) - min(reached)))
    margin = 0.07 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    axes.set_xscale("log")
    axes.set_xlim(common[0].tokens / 1.12, common[-1].tokens * 1.12)


def _draw_reading(
    axes: Axes,
    common: list[Budget],
    whole: float,
    loss: Estimate,
    speedup: Estimate | None,
    look: Look,
    *,
    strong: bool,
) -> float:
    """The mark at T and the way across to the baseline's line, and down from there for the headline.

    Returns:
        Where the way across ends, in tokens.
    """
    axes.plot([whole], [loss.value], marker=look.marker, color=look.color, markersize=7 if strong else 5, zorder=5)
    if speedup is None or loss.value > axes.get_ylim()[1]:
        return whole
    meets = min(max(speedup.value * whole, common[0].tokens), common[-1].tokens)
    width = 1.6 if strong else 0.8
    axes.plot([whole, meets], [loss.value] * 2, color=look.color, linewidth=width, linestyle=look.linestyle, zorder=4)
    if speedup.bound is None:
        axes.plot([meets], [loss.value], marker="|", color=look.color, markersize=9, zorder=5)
        if strong:
            bottom = axes.get_ylim()[0]
            axes.annotate(
                "",
                xy=(meets, bottom),
                xytext=(meets, loss.value),
                arrowprops={"arrowstyle": "-|>", "color": look.color, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0},
            )
            low, high = np.log(axes.get_xlim())
            left = (np.log(meets) - low) / (high - low) < 0.6
            axes.annotate(
                f"D = {numbers.ratio(speedup.value)} T",
                (meets, bottom),
                xytext=(6 if left else -6, 5),
                textcoords="offset points",
                ha="left" if left else "right",
                fontsize=8,
                fontweight="bold",
                color=look.color,
            )
    return max(meets, whole)


def _draw_baseline(axes: Axes, lines: dict[float, list[Budget]], results: Results, looks: dict[str, Look]) -> None:
    look = looks[results.baseline]
    for batch, points in lines.items():
        tokens, values = [point.tokens for point in points], [point.loss.value for point in points]
        if batch != results.tokens_per_step:
            axes.plot(tokens, values, color=MUTED, linestyle=":", linewidth=1, marker=look.marker, markersize=3)
            axes.annotate(
                f"at {numbers.count(batch)} a step",
                (tokens[0], values[0]),
                xytext=(4, 5),
                textcoords="offset points",
                fontsize=7.5,
                color=MUTED,
            )
            continue
        axes.plot(
            tokens, values, color=look.color, linestyle="-", linewidth=1.6, marker=look.marker, markersize=5, zorder=3
        )
        for point in points:
            if point.loss.low is not None and point.loss.high is not None:
                axes.plot([point.tokens] * 2, [point.loss.low, point.loss.high], color=look.color, linewidth=1.0)
