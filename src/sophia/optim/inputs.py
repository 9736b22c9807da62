"""A model's inputs, cut along the batch: their first dimension."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

_REMEDY = "call optimizer.refresh_curvature(forward) yourself in this loop"


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of rows that all tensors among the inputs have.

    Raises:
        ValueError: there is none, they differ, or an input is opaque: a slice of it cannot be made.
    """
    found: list[tuple[str, Tensor]] = []
    lists: list[tuple[str, list[Any]]] = []
    for name, leaf in (*_leaves(args, ""), *_leaves(kwargs, "")):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested:
            found.extend([(name, leaf)] if leaf.dim() > 0 else [])
        elif isinstance(leaf, list):
            lists.append((name, leaf))
        elif not _is_setting(leaf):
            kind = f"{type(leaf).__name__} of layout {leaf.layout}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"{name} of the model is a {kind}, which attach() cannot slice along the batch: {_REMEDY}")
    if not found:
        raise ValueError(
            "the model was called without a tensor input that has a batch dimension, so attach() has nothing to slice: "
            f"{_REMEDY}"
        )
    rows = found[0][1].shape[0]
    for name, tensor in found:
        if tensor.shape[0] != rows:
            raise ValueError(
                f"{name} of the model has shape {tuple(tensor.shape)} and {found[0][0]} {tuple(found[0][1].shape)}: "
                "attach() slices all inputs along their first dimension, the batch, which must have one size; "
                f"{_REMEDY}"
            )
    for name, items in lists:
        if len(items) == rows:
            raise ValueError(
                f"{name} of the model is a list of {rows} items, as many as the batch has rows, and attach() cannot "
                "tell whether to slice it too: pass it as a tensor (or as a tuple, if it does not belong to the "
                f"batch), or {_REMEDY}"
            )
    return rows


def sliced(value: Any, part: slice) -> Any:
    """The value with every tensor in it replaced by a detached copy of its rows `part`."""
    return _mapped(value, lambda tensor: tensor.detach()[part].clone() if tensor.dim() > 0 else tensor)


def widened(value: Any) -> Any:
    """The value with fp16 and bf16 tensors in it as fp32: autocast takes those, the bare model would not."""
    return _mapped(value, lambda tensor: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        new = copy.copy(value)  # of the same class: what a tokenizer gives is read by attribute as well
        new.update({key: _mapped(item, change) for key, item in value.items()})
        return new
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What nested tuples, lists and mappings hold, with a name for each; a list of settings is one leaf."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(value, tuple) or (isinstance(value, list) and not all(map(_is_setting, value))):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]" if name else f"input {index}")
    else:
        yield name, value


def _is_setting(value: Any) -> bool:
    """Whether a value is passed on as it is: it has no rows."""
    return value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device))
