"""What an optimizer is doing, in numbers that stay on the device until someone looks at them."""

from typing import Any

import torch
from torch import Tensor

from sophia.optim import update
from sophia.optim.clock import Clock
from sophia.optim.dtensor import local
from sophia.optim.reach import Reach
from sophia.optim.replicas import Replicas


def summarise(
    groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    *,
    clock: Clock,
    reach: Reach,
    scratch: update.Scratch,
    replicas: Replicas | None,
) -> dict[str, Tensor]:
    """The figures of `Sophia.stats`, summed over the shards of these replicas, or of this rank where there are none."""
    device = local(groups[0]["params"][0]).device
    totals = torch.zeros(4, dtype=torch.float32, device=device)
    for group in groups:
        for p in group["params"]:
            if p not in reach or p not in state:
                continue
            exp_avg, hessian = local(state[p]["exp_avg"]), local(state[p]["hessian"])
            sums = update.statistics(exp_avg, hessian, gamma=group["gamma"], eps=group["eps"], scratch=scratch)
            totals += sums.to(device, non_blocking=True) * (replicas.shard_weight(p) if replicas else 1.0)
    if replicas:
        totals = replicas.sum_shards(totals)
    clipped, coordinates, momentum, curvature = totals.unbind()
    return {
        "clip_fraction": clipped / coordinates.clamp_min(1),
        "momentum_norm": momentum.sqrt(),
        "curvature_norm": curvature.sqrt(),
        "curvature_age": _scalar(clock.age, device),
        "refused_refreshes": _scalar(clock.refused, device),
    }


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):  # the host does not know it
        return value.to(device=device, dtype=torch.float32, non_blocking=True)
    return torch.full((), float(value), device=device)
