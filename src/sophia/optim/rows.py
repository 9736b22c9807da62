"""The tensors of a param group as the rule takes them: lists by device, of plain tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sophia.optim.dtensor import local, localise
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
    rounded: bool = False
    """Whether any m is bfloat16, whose rounding needs keys."""


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
    states: Mapping[Tensor, dict[str, Any]],
    complete: Callable[[Tensor], dict[str, Any]],
    reach: Reach,
    key: Callable[[Tensor], int],
    counts: Mapping[torch.device, bool],
) -> Gathered:
    """Collect gradients and state.

    Python takes longer over this than a GPU over the step of a small model: what need not be asked is not.

    Args:
        params: of a param group.
        states: the optimizer's.
        complete: gives a parameter's state with nothing missing.
        reach: the parameters that the curvature has reached.
        key: gives a parameter's key for rounding a bfloat16 m.
        counts: whether `step` is to be on this device rather than on the host.
    """
    gathered = Gathered()
    all_reached = reach.is_complete
    device, counted = None, False
    moving: Rows | None = None
    holding: Rows | None = None
    for p in params:
        grad = p.grad
        if grad is None and not p.requires_grad:
            continue
        try:
            own = states[p]
            theta, exp_avg, hessian, step = p, own["exp_avg"], own["hessian"], own["step"]
        except KeyError:  # also without a gradient: a checkpoint of unused parameters must be loadable
            own = complete(p)
            theta, exp_avg, hessian, step = p, own["exp_avg"], own["hessian"], own["step"]
        if grad is None:
            continue
        if type(p) is not nn.Parameter or type(grad) is not Tensor:
            theta, grad, exp_avg, hessian = local(p), localise(grad, p), local(exp_avg), local(hessian)
        if theta.device != device:  # seldom: looking a device up takes longer than comparing it
            device = theta.device
            counted, moving, holding = counts[device], None, None
        if counted and step.device != device:
            own["step"] = step = step.to(device, non_blocking=True)
        if all_reached or p in reach:
            rows = moving = moving or gathered.moving.setdefault(device, Rows())
            rows.params.append(theta)
            rows.hessians.append(hessian)
        else:
            rows = holding = holding or gathered.holding.setdefault(device, Rows())
        rows.grads.append(grad)
        rows.exp_avgs.append(exp_avg)
        if exp_avg.dtype is torch.bfloat16:
            rows.keys.append(key(p))
            rows.rounded = True
        else:
            rows.keys.append(0)
        rows.steps.append(step)
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


def on_device(value: Any, device: torch.device) -> Any:
    """A scalar on the device where tensors are that it is for; numbers and tensors in main memory as they are."""
    if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != device:
        return value.to(device, non_blocking=True)
    return value
