"""The rule of :class:`SophiaK` for one tensor: Sophia's, in another basis, to another length.

A function of plain tensors that knows no optimizer and takes no decision about *when*.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia.optim.eigenbasis import rotate, rotate_back
from sophia.optim.orthogonal import newton_schulz

ADAM_EPS = 1e-8

Basis = tuple[Tensor | None, Tensor | None]
"""Q_R and Q_C: eigenvectors as columns; None for a side that is not turned."""

# Root mean squares below it count as zero: u is in units of the clip, and squares of less vanish in fp32.
_LEAST = 1e-7


@dataclass(frozen=True, kw_only=True)
class MatrixRule:
    """What becomes of a momentum and a diagonal of curvature."""

    gamma: float
    """γ, factor on the curvature."""
    eps: float
    """ε, the least denominator."""
    exponent: float
    """p, of the curvature: 1 is Newton's, ½ Adam's."""
    clip: bool
    """Whether each coordinate is clipped to ±1, in the basis."""
    orthogonalize: int
    """Newton-Schulz steps on what comes out of the basis; 0 leaves it as it is."""
    update_rms: float | None
    """Root mean square of the update for a learning rate of 1; None leaves its length as it is."""
    rtol: float
    """Mean curvature of a direction of the basis, over that of the matrix, below which it counts as rounding."""
    product_dtype: torch.dtype | None
    """In which rotations, quotients and Newton-Schulz steps are computed; None is that of the momentum."""


def direction(x: Tensor, divisor: Tensor, basis: Basis, rule: MatrixRule, dtype: torch.dtype | None = None) -> Tensor:
    """What a parameter moves by, for a learning rate of −1.

        u = clip(Q_Rᵀ x Q_C / divisor, ±1)
        u ← Q_R u Q_Cᵀ,  orthogonalized,  scaled to its root mean square

    All of it is computed in the rule's `product_dtype`, quotients too: fp32 between the products is two more passes
    over memory.

    Args:
        x: the momentum, in the parameter's own basis, [rows, columns], or [matrices, rows, columns] of several at once;
            of a parameter that is no matrix, whatever its shape, as one row.
        divisor: max(γ Dᵖ, ε) as of :func:`bound`, x's shape.
        basis: what it is turned by, [matrices, side, side] for several.
        rule: the rest.
        dtype: of the result; None is that of x.
    """
    dtype = dtype or x.dtype
    low = rule.product_dtype or dtype
    rows, columns = (None if side is None else side.to(low) for side in basis)
    u = unscaled(x.to(low), divisor.to(low), (rows, columns), rule)
    return u.to(dtype) if rule.update_rms is None else scaled(u, rule.update_rms, dtype=dtype)


def unscaled(x: Tensor, divisor: Tensor, basis: Basis, rule: MatrixRule) -> Tensor:
    """What :func:`direction` gives, all arguments in the dtype of the products, before it gets its length."""
    u = rotate(x, *basis) / divisor
    if rule.clip:
        u.clamp_(-1, 1)
    u = rotate_back(u, *basis)
    return newton_schulz(u, rule.orthogonalize) if rule.orthogonalize else u


def bound(diagonal: Tensor, basis: Basis, rule: MatrixRule) -> Tensor:
    """max(γ Dᵖ, ε): where a momentum is clipped."""
    seen = measured(diagonal, basis, rule.rtol)
    raised = seen if rule.exponent == 1.0 else seen.pow(rule.exponent)
    return torch.mul(raised, rule.gamma).clamp_min_(rule.eps)


def measured(diagonal: Tensor, basis: Basis, rtol: float) -> Tensor:
    """D, with its mean over the matrix in directions of the basis in which nothing but rounding was measured.

    There are directions that no gradient enters: of outputs into a residual stream that only LayerNorms read the mean,
    of inputs from a LayerNorm its inverse gains, as long as these do not change. There momentum and D are rounding
    alone, and one over the other would be clipped to a full step. With the mean such a direction stands still, and one
    that the samples have only missed moves moderately.

    Args:
        diagonal: D, [..., rows, columns].
        basis: tells the sides that are turned. On others what no gradient enters is nought, and stays.
        rtol: a direction's mean curvature, over the matrix's, below which it counts as rounding.
    """
    turned = [dim for side, dim in zip(basis, (-1, -2), strict=True) if side is not None]
    if rtol == 0 or not turned:
        return diagonal
    mean = diagonal.mean(dim=(-2, -1), keepdim=True)
    missed = [diagonal.mean(dim=dim, keepdim=True) < rtol * mean for dim in turned]
    return torch.where(missed[0] | missed[-1], mean, diagonal)


def scaled(u: Tensor, rms: float, mean_square: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """U to the root mean square ``rms``; zeros stay zeros, and what is next to them stays small.

    Args:
        u: [..., rows, columns]; any shape with its mean square.
        rms: wanted.
        mean_square: of what u is a part of; None where it is all.
        dtype: of the result; None is that of u.
    """
    dtype = dtype or u.dtype
    factor = length_factor(u, rms, dtype, mean_square)
    return u * factor if u.dtype == dtype else u.to(dtype).mul_(factor)


def length_factor(u: Tensor, rms: float, dtype: torch.dtype, mean_square: Tensor | None = None) -> Tensor:
    """What :func:`scaled` multiplies by, [..., 1, 1]."""
    if mean_square is None:
        size = math.prod(u.shape[-2:])
        present = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True, dtype=dtype) / size**0.5
    else:
        present = mean_square.sqrt()
    factor: Tensor = rms / present.clamp_min(_LEAST)
    return factor


def adam(m: Tensor, squares: Tensor) -> Tensor:
    """Adam's update for a learning rate of −1 (Kingma and Ba 2015, arXiv 1412.6980), of bias-corrected averages."""
    return m / squares.sqrt().add_(ADAM_EPS)
