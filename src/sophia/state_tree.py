"""An optimizer's state where it is more than tensors: numbers, texts, lists and dicts of them, to JSON and back."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def encoded(value: Any, place: str, keep: Callable[[str, Tensor], None]) -> Any:
    """What JSON can hold of a value; its tensors go to ``keep`` under names that begin with ``place``.

    Raises:
        ValueError: It holds something of another kind.
    """
    if isinstance(value, Tensor):
        keep(place, value)
        return {"tensor": place}
    if value is None or type(value) in (bool, int, float, str):
        return {"plain": value}
    if type(value) in (list, tuple):
        kind = type(value).__name__
        return {kind: [encoded(item, f"{place}/{index}", keep) for index, item in enumerate(value)]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: encoded(item, f"{place}/{key}", keep) for key, item in value.items()}}
    raise ValueError(f"{place} is a {type(value).__name__}, which a checkpoint cannot hold")


def decoded(tree: Any, find: Callable[[str], Tensor]) -> Any:
    """The value that was encoded, with the tensors that ``find`` gives for their names."""
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return find(content)
    if kind == "dict":
        return {key: decoded(item, find) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [decoded(item, find) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
