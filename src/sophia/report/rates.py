"""Figures of the search: loss against learning rate, a panel for each optimizer."""

from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from sophia.report import numbers
from sophia.report.axes import Area, frame, log_ticks, short, title
from sophia.report.looks import INK, MUTED, Look
from sophia.report.picture import Panel, Picture
from sophia.report.reading import Record, Results, items, number, part, records


class Tried(NamedTuple):
    """One run of a search."""

    lr: float
    loss: float | None
    """None: diverged."""
    others: str
    """All other settings, as one text: runs that share it make a line."""


def rates(results: Results, looks: dict[str, Look]) -> Picture | None:
    """The search of each optimizer at budget T and the common batch; None where none has run."""
    searches = {name: search for name in results.entries if (search := main_search(results, name))}
    tried = {name: _tried(search) for name, search in searches.items()}
    tried = {name: found for name, found in tried.items() if found}
    if not tried:
        return None
    limits = _limits(tried)
    panels = [
        Panel(
            draw=partial(
                _draw,
                name=name,
                found=found,
                look=looks[name],
                limits=limits,
                edges=any(str(edge).startswith("lr ") for edge in items(searches[name], "edges")),
            ),
            description=_describe(name, found),
            width=3.1,
            height=2.3,
        )
        for name, found in tried.items()
    ]
    return Picture(
        name="learning-rates",
        panels=tuple(panels),
        columns=3,
        caption="Every trial at budget T: final loss of one run (the search's seed) against its learning rate. Lines "
        "join trials that differ in nothing else; other settings are in the tables below. A ring marks the best. "
        "Crosses above the line at the top diverged, triangles there are above the figure.",
    )


def main_search(results: Results, name: str) -> Record:
    """The entry's search at budget T and the common batch; empty where there is none."""
    for search in records(results.entries.get(name), "searches"):
        if number(search.get("tokens")) == results.tokens and (
            number(search.get("tokens_per_step")) in (results.tokens_per_step, None)
        ):
            found: Record = search
            return found
    return {}


def _tried(search: Record) -> list[Tried]:
    found = []
    for trial in records(search, "trials"):
        chosen = part(trial, "settings")
        rate = number(chosen.get("lr"))
        if rate is not None and rate > 0:
            others = ", ".join(f"{key}={chosen[key]}" for key in sorted(chosen) if key != "lr")
            found.append(Tried(rate, number(trial.get("loss")), others))
    return found


def _limits(tried: dict[str, list[Tried]]) -> tuple[float, float]:
    """One scale for all, from the best; losses far above all optimizers' good ones would flatten it."""
    losses = [one.loss for found in tried.values() for one in found if one.loss is not None]
    if not losses:
        return 0.0, 1.0
    least, most = min(losses), min(max(losses), float(np.quantile(losses, 0.85)))
    margin = 0.08 * (most - least) or 0.02
    return least - margin, most + 3 * margin


def _describe(name: str, found: list[Tried]) -> str:
    good = [one for one in found if one.loss is not None]
    diverged = f", {len(found) - len(good)} diverged" if len(good) < len(found) else ""
    if not good:
        return f"{name}: {len(found)} trials, all diverged"
    best = min(good, key=lambda one: one.loss or 0.0)
    what = f"best loss {numbers.loss(best.loss)} at learning rate {numbers.rate(best.lr)}"
    return f"{name}: {len(found)} trials{diverged}; {what}"


def _draw(area: Area, *, name: str, found: list[Tried], look: Look, limits: tuple[float, float], edges: bool) -> None:
    axes = frame(area, left=0.5, right=0.16, bottom=0.44)
    title(axes, short(name, 16), left=0.5)
    axes.set_xlabel("learning rate")
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}" if value < 1 else f"{value:.2f}"))
    lrs = [one.lr for one in found]
    reach = max(max(lrs) / min(lrs), 2.0) ** 0.12
    axes.set_xscale("log")
    axes.set_xlim(min(lrs) / reach, max(lrs) * reach)
    axes.set_xticks(log_ticks(*axes.get_xlim(), 4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.rate(value)))
    good = [one for one in found if one.loss is not None]
    best = min(good, key=lambda one: one.loss or 0.0) if good else None
    for others in sorted({one.others for one in good}):
        line = sorted((one.lr, one.loss) for one in good if one.others == others)
        same = best is not None and others == best.others
        axes.plot(
            *zip(*line, strict=True),
            color=look.color,
            linewidth=1.3 if same else 0.8,
            linestyle="-" if same else ":",
            marker=look.marker,
            markersize=4.5 if same else 4,
            markerfacecolor=look.color if same else "none",
        )
    _mark_top(axes, found, limits[1])
    if best is not None:
        _mark_best(axes, best)
    _say(axes, best, edges=edges)


def _mark_top(axes: Axes, found: list[Tried], top: float) -> None:
    """What has no place by its loss."""
    edge = axes.get_xaxis_transform()
    above = [one.lr for one in found if one.loss is None or one.loss > top]
    if not above:
        return
    axes.axhline(top - 0.11 * (top - axes.get_ylim()[0]), color=MUTED, linewidth=0.6, linestyle=(0, (2, 2)))
    for marker, group in (
        ("x", [one.lr for one in found if one.loss is None]),
        ("^", [one.lr for one in found if one.loss is not None and one.loss > top]),
    ):
        axes.plot(
            group,
            [0.95] * len(group),
            linestyle="none",
            marker=marker,
            color=INK,
            markersize=5,
            transform=edge,
            clip_on=False,
        )


def _mark_best(axes: Axes, best: Tried) -> None:
    assert best.loss is not None
    axes.plot([best.lr], [best.loss], marker="o", markersize=11, markerfacecolor="none", color=INK, markeredgewidth=1)


def _say(axes: Axes, best: Tried | None, *, edges: bool) -> None:
    """What came of it, beside the title."""
    text = "all diverged" if best is None else f"best at {numbers.rate(best.lr)}"
    text += ", on an edge" if edges else ""
    axes.text(1.0, 1.035, text, transform=axes.transAxes, fontsize=8, ha="right", va="bottom")
