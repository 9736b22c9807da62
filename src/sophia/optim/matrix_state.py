"""The state dict of :class:`SophiaK` under FSDP2: what one rank alone holds, on all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.optim import matrix_owners, state
from sophia.optim.matrix_member import Member
from sophia.optim.replicas import Replicas


def completed(
    saved: dict[str, Any],
    members: Sequence[Member],
    states: Mapping[Tensor, Mapping[str, Any]],
    dtypes: Mapping[Tensor, torch.dtype],
    replicas: Replicas,
) -> dict[str, Any]:
    """A state dict of this rank with copies of what other ranks hold of sharded matrices. All ranks call it.

    Args:
        saved: the state dict; entries of its `state` are replaced.
        members: all parameters, in its order.
        states: theirs.
        dtypes: of their sampled diagonals.
        replicas: the ranks.
    """
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    spread = [(index, one) for index, one in zip(indices, members, strict=True) if one.place is not None]
    if not spread:
        return saved
    present = [[int(name in saved["state"].get(index, {})) for name in one.shapes()] for index, one in spread]
    everywhere = replicas.gather([flag for flags in present for flag in flags], members[0].p.device)
    flags = iter([any(theirs) for theirs in zip(*everywhere, strict=True)])
    for index, one in spread:
        held = {name: shape for name, shape in one.shapes().items() if next(flags) and name != "exp_avg"}
        if held:
            copies = _copies(one, held, states[one.p], dtypes[one.p])
            saved["state"][index] = {**saved["state"][index], **copies}
    return saved


def _copies(
    one: Member, shapes: Mapping[str, Sequence[int]], own: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the owner of a matrix holds of its state."""
    assert one.place is not None
    copies: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        exact = dtype if name == "hessian" else state.dtype_of_state(one.p, None)
        like = torch.empty(tuple(shape), dtype=exact, device=one.p.device)
        copies[name] = matrix_owners.copied(one.place, own.get(name), like)
    return copies
