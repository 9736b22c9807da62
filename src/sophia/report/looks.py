"""How an optimizer looks in all figures: told apart by line and marker too, for print without colour."""

from collections.abc import Sequence
from typing import Any, NamedTuple

INK = "#1d1f21"
MUTED = "#63676b"
GRID = "#dcdee0"
PAPER = "#fefefe"

# Distinct for the colour-blind, three times as dark as paper at least (light page) or as bright as it (dark page).
_COLOURS = (
    ("#5a5a5b", "#b9b9ba"),
    ("#0b6fb8", "#58b0f0"),
    ("#c44e00", "#ff9152"),
    ("#00795a", "#3fc79d"),
    ("#9b2d77", "#e88bc8"),
    ("#8a6a00", "#dcb43c"),
    ("#4b3fa8", "#a79bff"),
    ("#6b4226", "#c99b76"),
)
_LINES: tuple[Any, ...] = ("--", "-", "-.", (0, (1, 1.2)), (0, (6, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2, 2, 2)))
_MARKERS = ("s", "o", "^", "D", "v", "P", "X", "<", "h", ">", "*")

# Colours of the figures -> custom properties of the page, with their values on a light and on a dark page.
VARIABLES: dict[str, tuple[str, str, str]] = {
    INK: ("--ink", INK, "#e8eaec"),
    MUTED: ("--muted", MUTED, "#a3a8ad"),
    GRID: ("--grid", GRID, "#3a3f44"),
    PAPER: ("--paper", PAPER, "#16181a"),
    **{light: (f"--c{index}", light, dark) for index, (light, dark) in enumerate(_COLOURS)},
}


class Look(NamedTuple):
    """Colour, line and marker."""

    color: str
    linestyle: Any
    marker: str
    linewidth: float = 1.3


def looks(names: Sequence[str], baseline: str, headline: str) -> dict[str, Look]:
    """A look for each name: the baseline's and the headline's are the same in every report."""
    others = [name for name in names if name not in (baseline, headline)]
    found = {}
    for place, name in [(0, baseline), (1, headline), *enumerate(others, start=2)]:
        if name not in names:
            continue
        colour = place if place < len(_COLOURS) else 2 + (place - 2) % (len(_COLOURS) - 2)
        width = 2.0 if name == headline else 1.3
        found[name] = Look(
            _COLOURS[colour][0], _LINES[place % len(_LINES)], _MARKERS[place % len(_MARKERS)], linewidth=width
        )
    return {name: found[name] for name in names}


def variables() -> str:
    """The custom properties as CSS, for light and dark pages; paper is white whatever the screen was."""
    light = "".join(f"{name}:{value};" for name, value, _ in VARIABLES.values())
    dark = "".join(f"{name}:{value};" for name, _, value in VARIABLES.values())
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
