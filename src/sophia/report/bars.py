"""Bars with intervals: speed-ups, and what ablations change."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from sophia.report import numbers
from sophia.report.axes import Area, folded, frame, log_ticks, size, text_width
from sophia.report.axes import title as set_title
from sophia.report.looks import INK, MUTED, Look
from sophia.report.picture import Panel, Picture
from sophia.report.reading import Estimate, Results, claimed, estimate, records

_SIZE = 8.0
_BOTTOM = 0.3  # inches
_MARGINS = 0.32 + _BOTTOM
_ROW = 0.25
_ARROW = 14  # points


class Bar(NamedTuple):
    """One line of the figure."""

    name: str
    color: str
    found: Estimate
    text: str
    """The value, written at the right."""
    sure: bool
    """Whether it differs from no effect: a full bar."""


_SPEEDUPS = (
    ("speedup_tokens", "Speed-up in tokens"),
    ("speedup_seconds", "Speed-up in time"),
    ("speedup_flops", "Speed-up in operations"),
)


def speedups(results: Results, looks: dict[str, Look]) -> Picture | None:
    """How many times the baseline's budget an optimizer's loss would take; None where nothing is known."""
    panels = []
    for key, title in _SPEEDUPS:
        bars = []
        for name in results.ranked:
            found = estimate(results.entries[name], key)
            if found is not None and found.value > 0 and name != results.baseline:
                bars.append(
                    Bar(
                        name,
                        looks[name].color,
                        found,
                        _with_interval(found),
                        claimed(results.entries[name], key, found),
                    )
                )
        if bars:
            panels.append(_panel(title, bars, neutral=1.0, logarithmic=True, write=numbers.ratio, width=3.7))
    if not panels:
        return None
    height = max(panel.height for panel in panels)
    return Picture(
        name="speedups",
        panels=tuple(Panel(draw=p.draw, description=p.description, width=p.width, height=height) for p in panels),
        columns=3,
        caption=f"Speed-up against {results.baseline}, on a logarithmic axis, with 95 % intervals over seeds. Full "
        "bars: the interval excludes 1. Hollow bars: it does not, and nothing is claimed. An arrow: a bound only, "
        f"because the loss lies beyond what {results.baseline} was measured to reach.",
    )


def ablations(results: Results) -> Picture | None:
    """What each change does to the loss; None where none has run."""
    bars = []
    changes = records(results.record, "ablations")
    several = len({change.get("of") for change in changes}) > 1
    for change in changes:
        found = estimate(change, "difference")
        if found is not None:
            name = f"{change.get('of')}: {change.get('name')}" if several else str(change.get("name"))
            bars.append(Bar(name, MUTED, found, numbers.difference(found.value), found.excludes(0.0)))
    if not bars:
        return None
    panel = _panel(
        "Change in loss", bars, neutral=0.0, logarithmic=False, write=_short_difference, width=3.9, longest=28
    )
    return Picture(
        name="ablations",
        panels=(panel,),
        columns=1,
        caption="Difference in final loss from the entry that is changed, in pairs of equal seed, with 95 % intervals. "
        "To the left of 0 the change lowers the loss: it is better with it. Hollow bars: the interval holds 0.",
    )


def _panel(
    title: str,
    bars: Sequence[Bar],
    *,
    neutral: float,
    logarithmic: bool,
    write: Callable[[object], str],
    width: float,
    longest: int = 16,
) -> Panel:
    return Panel(
        draw=partial(
            _draw, title=title, bars=bars, neutral=neutral, logarithmic=logarithmic, write=write, longest=longest
        ),
        description=f"{title}: " + ", ".join(f"{bar.name} {bar.text}" for bar in bars),
        width=width,
        height=_MARGINS + _ROW * len(bars),
    )


def _with_interval(found: Estimate) -> str:
    interval = ""
    if found.bound is None and found.low is not None and found.high is not None:
        interval = f" ({numbers.ratio(found.low)}–{numbers.ratio(found.high)})"
    return numbers.speedup(found) + interval


def _short_difference(value: object) -> str:
    return f"{float(str(value)):+.3g}".replace("-", "−") if value else "0"


def _draw(
    area: Area,
    *,
    title: str,
    bars: Sequence[Bar],
    neutral: float,
    logarithmic: bool,
    write: Callable[[object], str],
    longest: int,
) -> None:
    names = [folded(bar.name, longest) for bar in bars]
    left = text_width(names, size=_SIZE) + 0.12
    right = text_width([bar.text for bar in bars], size=_SIZE) + 0.16
    dots = area.get_figure(root=True).dpi
    # Rows of one height, whatever the panels beside this one need.
    spare = area.bbox.height / dots - (_MARGINS + _ROW * len(bars))
    axes = frame(area, left=left, right=right, bottom=_BOTTOM + max(spare, 0.0))
    set_title(axes, title, left=left)
    _limit(axes, bars, neutral, logarithmic=logarithmic, write=write)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), names, fontsize=_SIZE, linespacing=1.0)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.axvline(neutral, color=INK, linewidth=1.0, zorder=3)
    for place, bar in enumerate(bars):
        _draw_bar(axes, place, bar, neutral)
        axes.text(
            1.0 + 0.1 * dots / axes.get_window_extent().width,
            place,
            bar.text,
            transform=axes.get_yaxis_transform(),
            fontsize=_SIZE,
            va="center_baseline",
        )


def _limit(
    axes: Axes, bars: Sequence[Bar], neutral: float, *, logarithmic: bool, write: Callable[[object], str]
) -> None:
    """Room for every value, and for intervals as far as they do not flatten the rest."""
    values = [bar.found.value for bar in bars]
    ends = [end for bar in bars for end in (bar.found.low, bar.found.high) if end is not None]
    if logarithmic:
        low = max(min([neutral, *values, *ends]), min([neutral, *values]) / 1.6)
        high = min(max([neutral, *values, *ends]), max([neutral, *values]) * 1.6)
        axes.set_xscale("log")
        low, high = min(low / 1.06, 0.9), max(high * 1.06, 1.15)
        arrow = (high / low) ** (1.5 * _ARROW / size(axes)[0])
        bounds = [bar.found.bound for bar in bars]
        axes.set_xlim(low / arrow if "at most" in bounds else low, high * arrow if "at least" in bounds else high)
        axes.set_xticks(log_ticks(*axes.get_xlim(), 5))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        reach = max(abs(value) for value in values) or 0.01
        low = max(min([neutral, *values, *ends]), min([neutral, *values]) - reach)
        high = min(max([neutral, *values, *ends]), max([neutral, *values]) + reach)
        margin = 0.06 * (high - low) or 0.01
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def _draw_bar(axes: Axes, place: int, bar: Bar, neutral: float) -> None:
    found = bar.found
    axes.barh(
        place,
        found.value - neutral,
        left=neutral,
        height=0.62,
        facecolor=(bar.color, 0.45) if bar.sure else "none",
        edgecolor=bar.color,
        linewidth=1.1,
    )
    if found.bound is not None:
        forward = 1 if found.bound == "at least" else -1
        axes.annotate(
            "",
            xy=(found.value, place),
            xytext=(_ARROW * forward, 0),
            textcoords="offset points",
            arrowprops={"arrowstyle": "<|-", "color": bar.color, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )
    elif found.low is not None and found.high is not None:
        low, high = axes.get_xlim()
        ends = [max(found.low, low), min(found.high, high)]
        axes.plot(ends, [place, place], color=INK, linewidth=1.2, solid_capstyle="butt", zorder=4)
        for end, whole in zip(ends, (found.low, found.high), strict=True):
            if end == whole:  # an interval that leaves the figure has no cap
                axes.plot([end, end], [place - 0.16, place + 0.16], color=INK, linewidth=1.2, zorder=4)
