"""Axes with room for labels beside their lines, and the labels."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from sophia.report.looks import MUTED

Area = Figure | SubFigure
"""What a panel is drawn into: a figure of its own, or its part of one."""

_LABEL_SIZE = 8.0


class Label(NamedTuple):
    """A text to stand right of the axes, beside its point."""

    text: str
    color: str
    x: float
    """Of the point, in data."""
    y: float
    """Of the point, in data."""
    strong: bool = False


def short(name: str, longest: int = 22) -> str:
    """A name for a figure, cut where it is too long: tables have all of it."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def folded(name: str, longest: int) -> str:
    """A name on two lines where one does not hold it, and cut where two do not."""
    return "\n".join(textwrap.wrap(name, longest, max_lines=2, placeholder="…")) if len(name) > longest else name


def text_width(texts: Sequence[str], *, size: float = _LABEL_SIZE, bold: bool = False) -> float:
    """Inches that the widest text takes."""
    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    lines = [line for text in texts for line in text.split("\n") if line]
    widths = [text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] for line in lines]
    return max(widths, default=0.0) / 72


def frame(area: Area, *, left: float, right: float, top: float = 0.32, bottom: float = 0.46) -> Axes:
    """Axes with margins in inches: known before anything is drawn, unlike those of an automatic layout."""
    dots = area.get_figure(root=True).dpi
    width, height = area.bbox.width / dots, area.bbox.height / dots
    return area.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def size(axes: Axes) -> tuple[float, float]:
    """Width and height of the axes, in points."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box = axes.get_window_extent()
    return box.width / figure.dpi * 72, box.height / figure.dpi * 72


def title(axes: Axes, text: str, *, left: float) -> None:
    """A title that begins at the area's left edge, `left` inches from the axes."""
    axes.set_title(text, loc="left", x=-72 * (left - 0.04) / size(axes)[0])


def label_width(labels: Sequence[str]) -> float:
    """Inches that labels and their leaders need right of the axes."""
    return text_width([short(label) for label in labels], bold=True) + 0.26


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Names beside the ends of their lines, moved apart where they would overlap, a thin line leading to each.

    The axes' limits must be set.
    """
    if not labels:
        return
    labels = sorted(labels, key=lambda label: label.y)
    height = size(axes)[1]
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((label.x, label.y))[1]) * height for label in labels]
    gap = min(1.25 * _LABEL_SIZE, height / max(len(labels) - 1, 1))
    for label, place in zip(labels, spread(wanted, gap, 0.0, height), strict=True):
        axes.text(
            1.0 + 13 / size(axes)[0],
            place / height,
            short(label.text),
            transform=axes.transAxes,
            fontsize=_LABEL_SIZE,
            fontweight="bold" if label.strong else "normal",
            color=label.color,
            va="center_baseline",
        )
        start = to_axes.transform((label.x, label.y))
        edge = 1.0 + 10 / size(axes)[0]
        axes.plot(
            [start[0], max(1.0, start[0]), edge],
            [start[1], start[1], place / height],
            transform=axes.transAxes,
            clip_on=False,
            color=MUTED,
            linewidth=0.5,
            linestyle=":" if start[0] < 0.97 else "-",
            zorder=1,
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in the order of `wanted` (sorted), at least `gap` apart, as near to it as possible (least squares)."""
    blocks: list[list[float]] = []  # mean of what its members want less their offset, and how many they are
    for index, place in enumerate(wanted):
        blocks.append([place - index * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, weight = blocks.pop()
            before, others = blocks[-1]
            blocks[-1] = [(before * others + mean * weight) / (others + weight), others + weight]
    flat = [mean for mean, weight in blocks for _ in range(int(weight))]
    last = high - gap * (len(wanted) - 1)
    return [min(max(place, low), max(last, low)) + index * gap for index, place in enumerate(flat)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two positive limits, at most so many and not crowded, for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    apart = math.log(high / low) / (1.4 * most)
    found: list[float] = []
    for steps in ((1, 1.25, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
        gaps = [math.log(after / before) for before, after in itertools.pairwise(found)]
        if len(found) <= most and min(gaps, default=apart) >= apart:
            return found
    return found[:: max(1, -(-len(found) // most))]
