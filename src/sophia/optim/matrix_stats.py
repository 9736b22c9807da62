"""What :class:`SophiaK` is doing, counted in the bases."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.optim import kronecker, update
from sophia.optim.dtensor import local
from sophia.optim.eigenbasis import rotate
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_rounds import gathered, rounds
from sophia.optim.matrix_update import bound
from sophia.optim.replicas import Replicas


def totals(
    members: Sequence[Member],
    states: Mapping[Tensor, Mapping[str, Any]],
    replicas: Replicas | None,
    device: torch.device,
) -> Tensor:
    """Clipped coordinates, all coordinates, Σ m² and Σ D² of parameters with sampled curvature: [4].

    Args:
        members: the parameters.
        states: theirs.
        replicas: the ranks, for sums over the shards of all; None for what there is here, where a sharded hidden
            matrix, which no rank has whole, clips nothing.
        device: of the result.
    """
    found = torch.zeros(4, dtype=torch.float32, device=device)
    for several in rounds(members) if replicas else [[one] for one in members]:
        momenta = [local(states[one.p]["exp_avg"]).to(update.compute_dtype(one.p)) for one in several]
        m = gathered(several, momenta) if replicas else momenta[0]
        for one in several:
            if m is not None and (one.here or not replicas):
                weight = replicas.shard_weight(one.p) if replicas else 1.0
                found += _sums(one, states[one.p], m).to(found) * weight
    return found if replicas is None else replicas.sum_shards(found)


def _sums(one: Member, own: Mapping[str, Any], m: Tensor) -> Tensor:
    """Clipped coordinates, all coordinates, Σ m² and Σ D² of a parameter, or of what there is of it here: [4]."""
    rule = one.rule
    clipped = count = curvature = m.new_zeros(())
    if one.here:
        diagonal = local(own["hessian"]).to(m.dtype)
        curvature = diagonal.square().sum()
        if m.shape == diagonal.shape and rule.clip:
            basis = kronecker.basis(own)
            clipped = (rotate(one.parts(m), *basis).abs() > bound(one.parts(diagonal), basis, rule)).sum()
            count = m.new_full((), m.numel())
    return torch.stack([x.to(m.dtype) for x in (clipped, count, m.square().sum(), curvature)])
