"""Pieces that several sections of the page are made from."""

from collections.abc import Iterable, Mapping

from sophia.report import numbers
from sophia.report.markup import Markup, join, tag
from sophia.report.picture import Picture, svgs
from sophia.report.reading import Estimate, Record


def section(name: str, title: str, *content: object) -> Markup:
    """A section that the contents list links to."""
    return tag("section", tag("h2", title), *content, id=name)


def missing(what: str) -> Markup:
    """What stands in place of a figure or table whose runs are not there yet."""
    return tag("p", what, class_="note")


def figure(picture: Picture | None, otherwise: str = "") -> Markup | None:
    """A picture's panels with their caption, or a sentence on why there are none."""
    if picture is None:
        return missing(otherwise) if otherwise else None
    kind = "single" if len(picture.panels) == 1 else "small" if picture.panels[0].width < 3.8 else ""
    panels = tag("div", *svgs(picture), class_=f"panels {kind}".strip())
    return tag("figure", panels, tag("figcaption", picture.caption), id=f"figure-{picture.name}")


def losses(found: Estimate | None) -> Markup | str:
    """A loss with its interval."""
    return numbers.MISSING if found is None else _ranged(numbers.loss(found.value), found, numbers.loss)


def differences(found: Estimate | None) -> Markup | str:
    """A difference of losses with its interval."""
    return numbers.MISSING if found is None else _ranged(numbers.difference(found.value), found, numbers.difference)


def speedups(found: Estimate | None) -> Markup | str:
    """A speed-up with its interval."""
    return numbers.MISSING if found is None else _ranged(numbers.speedup(found), found, numbers.ratio)


def _ranged(text: str, found: Estimate, write: object) -> Markup:
    assert callable(write)
    if found.low is None or found.high is None or found.bound is not None:
        return tag("span", text, class_="plain")
    return join(
        [
            tag("span", text, class_="plain"),
            tag("span", f"({write(found.low)} to {write(found.high)})", class_="range"),
        ],
        " ",
    )


def settings(chosen: Record) -> str:
    """Settings in one line, the learning rate first."""
    if not chosen:
        return numbers.MISSING
    names = sorted(chosen, key=lambda name: (name != "lr", name))
    return ", ".join(f"{name} {numbers.setting(name, chosen[name])}" for name in names)


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """A list of names and values."""
    return tag("dl", *(join([tag("dt", name), tag("dd", value)]) for name, value in pairs), class_="facts")


def listed(value: object) -> str:
    """Anything in one line, without what is None."""
    if isinstance(value, Mapping):
        texts = [f"{str(key).replace('_', ' ')} {listed(part)}" for key, part in value.items() if part is not None]
        return ", ".join(texts) or numbers.MISSING
    if isinstance(value, list | tuple):
        return ", ".join(listed(part) for part in value) or numbers.MISSING
    return numbers.setting("", value)
