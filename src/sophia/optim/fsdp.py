"""What FSDP2 keeps beside the gathered parameters of a graph: their shards, and gradients that it has not reduced yet.

Neither has a public door, so this file opens private ones of torch; tests under `tests/distributed` go through each.
All functions speak of all FSDP2 modules in the process, and do nothing where there are none.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping


def sharded_parameters() -> Iterator[Tensor]:
    """The parameters that receive gradients; the graph of a forward ends in gathered copies of them."""
    for held in _held():
        yield held.sharded_param


def shards(model: nn.Module) -> bool:
    """Whether any module of a model is FSDP2's, whose parameters may be whole at the moment."""
    return any(module in _module_state_mapping for module in model.modules())


@contextlib.contextmanager
def unreduced_set_aside() -> Iterator[None]:
    """Inside, no gradient waits outside of `.grad` for `set_requires_gradient_sync(True)`; after it, those from before.

    With a reduce_dtype of its own FSDP2 accumulates them there, and adds them to whatever is reduced next.
    """
    kept = [(held, held.unsharded_accumulated_grad) for held in _held()]
    for held, _ in kept:
        held.unsharded_accumulated_grad = None
    try:
        yield
    finally:
        for held, grad in kept:
            held.unsharded_accumulated_grad = grad


@contextlib.contextmanager
def gathered_anew() -> Iterator[None]:
    """The first forward inside and the first one after it gather the parameters from the shards as they are then.

    After a forward that no backward followed (an evaluation, a refresh that failed, a chunk without predictions) the
    outermost module keeps its gathered copies, and would not see that a refresh or a step has changed the shards.
    """
    _reshard()
    try:
        yield
    finally:
        _reshard()


def computed_in(params: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype to which FSDP2 converts these parameters when it gathers them; None where it leaves all as they are."""
    wanted = {id(p) for p in params}
    for group in _groups():
        dtype: torch.dtype | None = group.mp_policy.param_dtype
        if dtype is not None and any(id(held.sharded_param) in wanted for held in group.fsdp_params):
            return dtype
    return None


def _reshard() -> None:
    for group in _groups():
        group.reshard()


def _held() -> Iterator[Any]:
    for group in _groups():
        yield from group.fsdp_params


def _groups() -> Iterator[Any]:
    for state in list(_module_state_mapping.values()):
        yield from getattr(state(), "_fsdp_param_groups", ())
