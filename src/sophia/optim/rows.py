"""The tensors of a param group as the rule takes them: lists by device, of plain tensors."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from sophia.optim.dtensor import in_use, local, localise
from sophia.optim.reach import Reach


@dataclass
class Rows:
    """θ, g, m and h of the parameters on one device, element i of each list of one parameter."""

    params: list[Tensor] = field(default_factory=list)
    """θ; empty where parameters hold still."""
    grads: list[Tensor] = field(default_factory=list)
    """g."""
    exp_avgs: list[Tensor] = field(default_factory=list)
    """m."""
    hessians: list[Tensor] = field(default_factory=list)
    """h; empty where parameters hold still."""
    keys: list[int] = field(default_factory=list)
    """For rounding m."""
    steps: list[Tensor] = field(default_factory=list)
    """`step` of the state."""


@dataclass
class Gathered:
    """The parameters of a group that have gradients."""

    moving: dict[torch.device, Rows] = field(default_factory=dict)
    """Those that the curvature has reached."""
    holding: dict[torch.device, Rows] = field(default_factory=dict)
    """The others."""

    def all(self) -> Iterator[tuple[torch.device, Rows]]:
        """First those that hold."""
        yield from self.holding.items()
        yield from self.moving.items()


def gather(
    params: Iterable[Tensor],
    state: Callable[[Tensor], dict[str, Any]],
    reach: Reach,
    key: Callable[[Tensor], int],
) -> Gathered:
    """Collect gradients and state.

    Args:
        params: of a param group.
        state: gives a parameter's state, complete.
        reach: the parameters that the curvature has reached.
        key: gives a parameter's key for rounding a bfloat16 m.
    """
    gathered = Gathered()
    all_plain, all_reached = not in_use(), reach.is_complete
    for p in params:
        grad = p.grad
        if grad is None and not p.requires_grad:
            continue
        own = state(p)  # also without a gradient: a checkpoint of unused parameters must be loadable
        if grad is None:
            continue
        theta, exp_avg, hessian = p, own["exp_avg"], own["hessian"]
        if not all_plain:
            theta, grad, exp_avg, hessian = local(p), localise(grad, p), local(exp_avg), local(hessian)
        reached = all_reached or p in reach
        rows_of = gathered.moving if reached else gathered.holding
        device = theta.device
        rows = rows_of.get(device)
        if rows is None:
            rows = rows_of[device] = Rows()
        if reached:
            rows.params.append(theta)
            rows.hessians.append(hessian)
        rows.grads.append(grad)
        rows.exp_avgs.append(exp_avg)
        rows.keys.append(key(p) if exp_avg.dtype == torch.bfloat16 else 0)
        rows.steps.append(own["step"])
    return gathered


def count_steps(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Add 1 to each, unless found_inf, where they are, is not zero."""
    if found_inf is not None:
        torch._foreach_add_(steps, [(found_inf == 0).to(torch.float32)] * len(steps))
    elif steps[0].device.type == "cpu":  # a python number would be wrapped into a tensor for each of them
        torch._foreach_add_(steps, torch.ones(()), alpha=1)
    else:
        torch._foreach_add_(steps, 1)


def as_scalar(value: Tensor | None) -> Tensor | None:
    """A tensor of one number as 0-D: `GradScaler` has them in one dimension."""
    return None if value is None else value.reshape(())


@overload
def on_device(value: Tensor | None, device: torch.device) -> Tensor | None: ...


@overload
def on_device(value: float | Tensor, device: torch.device) -> float | Tensor: ...


def on_device(value: float | Tensor | None, device: torch.device) -> float | Tensor | None:
    """A scalar on the device where tensors are that it is for; numbers and tensors in main memory as they are."""
    if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != device:
        return value.to(device, non_blocking=True)
    return value
