"""The nearest matrix with equal singular values: what Muon makes of a momentum (Jordan et al. 2024)."""

import torch
from torch import Tensor

# The quintic polynomial of Jordan et al. It takes singular values from 0.001 up to between 0.7 and 1.2 in five steps:
# the slope at zero is as steep as it can be, at the price of not converging to 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# Below it a matrix counts as one of zeros: squares of what is much smaller would be zero in fp32.
_LEAST = 1e-7


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of x = U S Vᵀ, by products alone: X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X from X / ‖X‖.

    Args:
        x: [..., rows, columns], computed in its own dtype. A matrix of zeros stays one.
        steps: of the iteration; each costs 4 n² N + 2 n³ operations for sides n <= N.
    """
    a, b, c = _COEFFICIENTS
    y = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(_LEAST)
    y = y.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    # Its smaller product is then XᵀX. X turned over would be read and written across memory.
    tall = x.shape[-2] > x.shape[-1]
    for _ in range(steps):
        gram = y.mT @ y if tall else y @ y.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factors = (y, polynomial) if tall else (polynomial, y)
        y = torch.baddbmm(y, *factors, beta=a)  # sums beside products: passes of their own cost as much
    found: Tensor = y.reshape(x.shape)
    return found
