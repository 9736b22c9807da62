"""Lion (Chen et al. 2023, arXiv 2302.06675, Algorithm 2): a baseline that torch does not ship."""

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class Lion(Optimizer):
    """The sign of an interpolation between momentum and gradient.

        u ← sign(β1 m + (1 − β1) g)
        θ ← θ − η (u + λ θ)
        m ← β2 m + (1 − β2) g

    With β1 = β2 what is signed is the new momentum: that is Signum (Bernstein et al. 2018, arXiv 1802.04434), and
    Sophia where all curvature is zero, without the memory for it.

    Args:
        params: parameters or param groups.
        lr: η, what every coordinate moves in a step (decay apart).
        betas: (β1, β2), of the interpolation and of the momentum.
        weight_decay: λ, decoupled.

    State of a parameter: `exp_avg` (m).

    As with torch's fused optimizers, an attribute `found_inf`, a 0-D tensor, leaves everything as it is where it is 1.
    The device decides that, and is not waited for.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; it must not be negative")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}; both must be at least 0 and below 1")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step from the gradients in `.grad`; ``closure`` computes them anew and returns the loss."""
        loss = None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            momenta = [self.state[p]["exp_avg"] for p in params]
            lr, (beta1, beta2) = group["lr"], group["betas"]
            before = None if found_inf is None else [x.clone() for x in (*params, *momenta)]
            updates = torch._foreach_lerp(momenta, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_lerp_(momenta, grads, 1 - beta2)
            if before is not None and found_inf is not None:
                for x, old in zip((*params, *momenta), before, strict=True):
                    x.copy_(torch.where(found_inf == 0, x, old))
        return loss
