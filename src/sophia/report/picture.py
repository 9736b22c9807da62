"""A figure of the report: panels that are SVGs of their own on the page, so that they fit a phone, and one PNG."""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sophia.report.axes import Area
from sophia.report.looks import GRID, INK, MUTED, VARIABLES
from sophia.report.markup import Markup, escape

_DPI = 160
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # it comes with matplotlib; wider than what browsers set, so that their text fits
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a $
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.unicode_minus": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "sophia",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    draw: Callable[[Area], None]
    """Draws it, under the style of this module, into an area of the given size."""
    description: str
    """What it shows, for those who do not see it."""
    width: float = 3.9
    """Inches. About a phone's width at the size of text that the style has."""
    height: float = 3.0
    """Inches."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Panels that belong together."""

    name: str
    """Of the PNG, without its suffix; part of the ids within the page."""
    panels: tuple[Panel, ...]
    """All of one size."""
    columns: int
    """Of the PNG; the page decides by its width."""
    caption: str
    """What the page says below."""


def save_png(picture: Picture, path: Path) -> Path:
    """Write the panels side by side."""
    columns = min(picture.columns, len(picture.panels))
    rows = math.ceil(len(picture.panels) / columns)
    size = picture.panels[0]
    with _style():
        figure = Figure(figsize=(columns * size.width, rows * size.height), facecolor="white")
        FigureCanvasAgg(figure)
        areas = figure.subfigures(rows, columns, squeeze=False)
        for panel, area in zip(picture.panels, areas.flat, strict=False):
            panel.draw(area)
        image = io.BytesIO()
        figure.savefig(image, dpi=_DPI, format="png", metadata={"Software": None})
    partial = path.with_suffix(".png.partial")
    partial.write_bytes(image.getvalue())
    partial.replace(path)
    return path


def svgs(picture: Picture) -> list[Markup]:
    """Each panel for a page: text as text, colours as the page's, ids that no other panel has."""
    return [_svg(panel, f"{picture.name}-{index}") for index, panel in enumerate(picture.panels, start=1)]


def _svg(panel: Panel, prefix: str) -> Markup:
    with _style():
        figure = Figure(figsize=(panel.width, panel.height))
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        panel.draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg")
    drawing = text.getvalue()
    body = drawing[drawing.index(">", drawing.index("<svg")) + 1 :]
    # The date, and a style that would hold for the whole page.
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'xlink:href="#', 'href="#', body)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: _own_id(found[1], prefix, used), body)
    body = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", body)
    body = re.sub(r"font-family: [^;\"]*(?:; )?", "", body)
    body = re.sub(r"font: ((?:\d+ |bold )?)([\d.]+px)[^;\"]*", _font, body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda found: _colour(found[0]), body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    width, height = 72 * panel.width, 72 * panel.height
    about = escape(panel.description)
    return Markup(
        f'<svg role="img" viewBox="0 0 {width:g} {height:g}" aria-labelledby="{prefix}-about">\n'
        f'<title id="{prefix}-about">{about}</title>\n{body}'
    )


def _own_id(name: str, prefix: str, used: set[str]) -> str:
    return f' id="{prefix}-{name}"' if name in used else ""


def _font(found: re.Match[str]) -> str:
    weight = found[1].strip()
    return f"font-size: {found[2]}" + (f"; font-weight: {weight}" if weight else "")


def _colour(value: str) -> str:
    return f"var({VARIABLES[value][0]})" if value in VARIABLES else value


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks: boxes in the PNG, but the page sets it in a font of the reader's.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield
