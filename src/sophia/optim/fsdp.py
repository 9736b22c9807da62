"""What FSDP2 keeps beside the parameters: gathered copies of them, and gradients that it has not reduced yet.

Neither has a public door, so this file opens private ones of torch; tests under `tests/distributed` go through each.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.tensor import DTensor


def reshard(params: Sequence[Tensor]) -> None:
    """Make FSDP2 modules gather their parameters anew at the next forward.

    After a forward that no backward followed (an evaluation, a refresh that failed) the outermost module keeps the
    gathered copy, and its next forward would not see that the shards have changed since.
    """
    for group in _groups(params):
        group.reshard()


@contextlib.contextmanager
def unreduced_set_aside(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside, no gradient waits outside of `.grad` for `set_requires_gradient_sync(True)`; after it, those from before.

    With a reduce_dtype of its own FSDP2 accumulates them there, and adds them to whatever is reduced next.
    """
    kept = [
        (held, held.unsharded_accumulated_grad)
        for group in _groups(params)
        for held in group.fsdp_params
        if hasattr(held, "unsharded_accumulated_grad")
    ]
    for held, _ in kept:
        held.unsharded_accumulated_grad = None
    try:
        yield
    finally:
        for held, grad in kept:
            held.unsharded_accumulated_grad = grad


def _groups(params: Sequence[Tensor]) -> Iterator[Any]:
    """FSDP2's groups of parameters, of all modules in this process."""
    if not any(isinstance(p, DTensor) for p in params):
        return
    for module, state in list(_module_state_mapping.items()):
        del module
        yield from getattr(state(), "_fsdp_param_groups", ())
