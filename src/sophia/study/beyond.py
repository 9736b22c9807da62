"""The next value of a setting beyond those tried: where a search goes when its best value is the outermost."""

from typing import TypeGuard

from sophia.study.runs import Value

Number = int | float

_DIGITS = 3
# The race's own upper end: a stronger decay than the learning rate itself leaves nothing to learn from.
_MOST = {"weight_decay": 1.0}
# Averages: what counts is how far they are from 1, the inverse of their memory.
_DECAYS = ("beta1", "beta2")
_DOUBLED = 2.0


def is_number(value: Value | None) -> TypeGuard[Number]:
    """Whether a value lies on a line, so that there is a next one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_end(value: Number) -> bool:
    """Whether nothing lies below this value by nature: no decay, no memory, every step."""
    return value == (1 if isinstance(value, int) else 0)


def beyond(name: str, edge: Number, neighbour: Number) -> Number | None:
    """The next value beyond ``edge``, as far from it as its neighbour is, by ratio; None: there is none.

    Args:
        name: Of the setting.
        edge: The outermost value tried.
        neighbour: The one next to it.
    """
    assert edge != neighbour
    if name in _DECAYS:
        gap, other = 1 - edge, 1 - neighbour
        value: Number = round(1 - _rounded(gap * gap / other), 12)
        # Below 0 there is nothing; 0 itself is no memory at all.
        value = max(value, 0.0)
    else:
        ratio = edge / neighbour if neighbour and edge else _DOUBLED
        value = min(_rounded(edge * ratio), _MOST.get(name, float("inf")))
    if isinstance(edge, int) and isinstance(neighbour, int):
        value = max(1, round(value))
    beyond_edge = value > edge if edge > neighbour else value < edge
    return value if beyond_edge else None


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
