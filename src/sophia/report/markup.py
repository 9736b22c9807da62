"""HTML from parts: whatever is not `Markup` already is escaped, so that no name of a study can be taken for a tag."""

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_VOID = ("br", "col", "hr", "meta", "wbr")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Text as HTML, unless it is HTML."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element. `class_` stands for class, an underscore in a name for a hyphen; attributes that are None are left
    out, True stands for an attribute without a value."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        words.append(word if value is True else f'{word}="{html.escape(str(value))}"')
    head = f"<{' '.join(words)}>"
    return Markup(head) if name in _VOID else Markup(f"{head}{join(content)}</{name}>")


def join(content: Iterable[object], between: str = "") -> Markup:
    """Parts one after the other; None is nothing."""
    return Markup(between.join(escape(piece) for piece in content if piece is not None))


class Column(NamedTuple):
    """A column of a table."""

    title: str
    numeric: bool = False
    """Aligned to the right, in figures of equal width."""
    wide: bool = False
    """Sentences, which a narrow page must not press into a column of words."""


class Row(NamedTuple):
    """A row of a table, the first cell its header."""

    cells: Sequence[object]
    strong: bool = False
    """Set in bold: the row that counts."""


def table(caption: object, columns: Sequence[Column], rows: Iterable[Row | Sequence[object]], *, label: str) -> Markup:
    """A table in a box of its own, which scrolls where the page is narrow.

    Args:
        caption: What it shows.
        columns: One for each cell of a row.
        rows: The first cell of each is the row's header.
        label: What screen readers call the box.
    """
    head = tag("tr", *(tag("th", column.title, scope="col", class_=_kind(column)) for column in columns))
    body = []
    for row in rows:
        full = row if isinstance(row, Row) else Row(row)
        first, *others = zip(full.cells, columns, strict=True)
        cells = [tag("th", first[0], scope="row", class_=_kind(first[1]))]
        cells += [tag("td", cell, class_=_kind(column)) for cell, column in others]
        body.append(tag("tr", *cells, class_="strong" if full.strong else None))
    inner = tag("table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def _kind(column: Column) -> str | None:
    return "number" if column.numeric else "wide" if column.wide else None
