"""Algorithm 3 of the paper in float64, as plainly as it can be written: what every path is held against."""

import torch
from torch import Tensor


def reference_sophia(
    theta: Tensor,
    grads: list[Tensor],
    estimates: list[Tensor | None],
    *,
    lr: float,
    betas: tuple[float, float] = (0.96, 0.99),
    gamma: float = 0.05,
    eps: float = 1e-12,
    weight_decay: float = 0.2,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """θ, m and h after one step for each gradient; estimates[t] is folded in before step t, None leaves h alone."""
    theta, m, h = theta.double(), torch.zeros_like(theta).double(), torch.zeros_like(theta).double()
    for grad, estimate in zip(grads, estimates, strict=True):
        g = -grad.double() if maximize else grad.double()
        m = betas[0] * m + (1 - betas[0]) * g
        if estimate is not None:
            h = betas[1] * h + (1 - betas[1]) * estimate.double()
        theta = theta - lr * weight_decay * theta
        theta = theta - lr * torch.clamp(m / torch.clamp(gamma * h, min=eps), -1, 1)
    return theta, m, h
