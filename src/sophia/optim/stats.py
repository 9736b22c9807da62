"""What an optimizer is doing, in numbers that stay on the device until someone looks at them."""

from typing import Any

import torch
from torch import Tensor

from sophia.optim import update
from sophia.optim.clock import Clock
from sophia.optim.dtensor import local
from sophia.optim.reach import Reach
from sophia.optim.replicas import Replicas


class ClipCount:
    """How many coordinates the last step clipped, where the fused paths counted them on the way.

    What they did not see (another path, a step that the device may have skipped), or what has changed since (curvature,
    state, settings), makes the count void.
    """

    def __init__(self) -> None:
        self._counters: dict[torch.device, Tensor] = {}
        self._settings: list[tuple[float, float]] = []
        self._parameters = 0
        self._valid = False

    def begin(self, groups: list[dict[str, Any]], *, certain: bool) -> None:
        """A step begins; certain: whether the host knows that it is taken."""
        for counter in self._counters.values():
            counter.zero_()
        self._settings = _bounds(groups)
        self._parameters = 0
        self._valid = certain

    def counter(self, device: torch.device, parameters: int, *, fused: bool) -> Tensor | None:
        """Where a path adds the clipped coordinates of so many parameters, int64 0-D; None where it does not count."""
        if not fused:
            self._valid = False
            return None
        self._parameters += parameters
        if device not in self._counters:
            self._counters[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._counters[device]

    def forget(self) -> None:
        """Curvature or state is another."""
        self._valid = False

    def total(self, groups: list[dict[str, Any]], parameters: int, device: torch.device) -> Tensor | None:
        """Clipped coordinates of the so many parameters whose curvature is known, 0-D; None where the count is void."""
        if not self._valid or self._parameters != parameters or self._settings != _bounds(groups):
            return None
        total = torch.zeros((), dtype=torch.float32, device=device)
        for counter in self._counters.values():
            total += counter.to(device, non_blocking=True)
        return total


def _bounds(groups: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(group["gamma"], group["eps"]) for group in groups]


def summarise(
    groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    *,
    clock: Clock,
    reach: Reach,
    scratch: update.Scratch,
    clips: ClipCount,
    replicas: Replicas | None,
) -> dict[str, Tensor]:
    """The figures of `Sophia.stats`, summed over the shards of these replicas, or of this rank where there are none."""
    device = local(groups[0]["params"][0]).device
    known = [(group, p) for group in groups for p in group["params"] if p in reach and p in state]
    weights = [replicas.shard_weight(p) if replicas else 1.0 for _, p in known]
    # One count holds all parameters: they must have one weight.
    counted = clips.total(groups, len(known), device) if len(set(weights)) == 1 else None
    totals = torch.zeros(4, dtype=torch.float32, device=device)
    for (group, p), weight in zip(known, weights, strict=True):
        exp_avg, hessian = local(state[p]["exp_avg"]), local(state[p]["hessian"])
        sums = update.statistics(
            exp_avg, hessian, gamma=group["gamma"], eps=group["eps"], scratch=scratch, count=counted is None
        )
        totals += sums.to(device, non_blocking=True) * weight
    if counted is not None:
        totals[0] = counted * weights[0]
    if replicas:
        totals = replicas.sum_shards(totals)
    return named(totals, clock)


def named(totals: Tensor, clock: Clock) -> dict[str, Tensor]:
    """The figures of `Sophia.stats`.

    Args:
        totals: clipped coordinates, all coordinates, Σ m² and Σ h²: [4].
        clock: of the optimizer.
    """
    device = totals.device
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
