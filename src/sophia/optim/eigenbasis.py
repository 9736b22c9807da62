"""The eigenbasis of a matrix's gradient statistics: what an element-wise rule can run in.

For a parameter W [rows, columns] with gradients G, Shampoo's statistics are averages of GGᵀ [rows, rows] and GᵀG
[columns, columns] (Gupta et al. 2018, arXiv 1802.09568). Their eigenvectors, as columns of Q_R and Q_C, turn G into
Q_Rᵀ G Q_C, whose entries are less correlated. A side without basis (None) is left as it is.

Everything here is a function of plain tensors and knows no optimizer.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

DecompositionError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def fold_outer(rows: Tensor | None, columns: Tensor | None, gradient: Tensor, weight: float) -> None:
    """Move the statistics to those of this gradient by ``weight``, in place: S ← (1 − w) S + w GGᵀ.

    Args:
        rows, columns: statistics of the two sides, [..., side, side]; [side, side] where several matrices share them.
        gradient: [..., rows, columns].
        weight: w.
    """
    for statistics, g in ((rows, gradient), (columns, gradient.mT)):
        if statistics is not None and g.ndim == 2:
            statistics.addmm_(g, g.T, beta=1 - weight, alpha=weight)
        elif statistics is not None:
            statistics.lerp_(outer(g, one_for_all=statistics.ndim == 2), weight)


def outer(gradient: Tensor, *, one_for_all: bool) -> Tensor:
    """GGᵀ, [..., rows, rows], or of several matrices one sum."""
    found: Tensor = gradient @ gradient.mT
    return found.sum(0) if one_for_all else found


def rotate(x: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Into the basis: Q_Rᵀ x Q_C; x itself where there is none."""
    turned = x if rows is None else rows.mT @ x
    return turned if columns is None else turned @ columns


def rotate_back(x: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Out of the basis: Q_R x Q_Cᵀ; x itself where there is none."""
    turned = x if rows is None else rows @ x
    return turned if columns is None else turned @ columns.mT


def eigenvectors(statistics: Tensor) -> Tensor:
    """All eigenvectors of a symmetric matrix as columns, that of the largest eigenvalue first.

    Raises:
        torch.linalg.LinAlgError: they were not found, not in fp64 either.
    """
    try:
        vectors: Tensor = torch.linalg.eigh(statistics)[1]
    except DecompositionError:  # LAPACK and cuSOLVER give up on some matrices whose rows are nearly alike
        vectors = torch.linalg.eigh(statistics.double())[1].to(statistics.dtype)
    return vectors.flip(-1)


def power_iteration(statistics: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from the last basis towards the eigenvectors (SOAP, algorithm 4).

    As in the authors' code columns come first into the order of their Rayleigh quotients, largest first: without that
    a direction whose eigenvalue has overtaken another's would be turned through it, slowly.

    Returns:
        The new basis, and which column of the last one each of its columns comes from.
    """
    moved = statistics @ basis
    order = torch.argsort((basis * moved).sum(dim=-2), descending=True, stable=True)
    turned, _ = torch.linalg.qr(torch.take_along_dim(moved, order.unsqueeze(-2), dim=-1))
    return turned, order


def carried(diagonal: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A matrix's diagonal of curvature, as it is seen from another basis.

    Where entries of different places are uncorrelated, x̂ = O_Rᵀ x O_C has the variances (O_R²)ᵀ D O_C².

    Args:
        diagonal: D, [rows, columns], in the old basis.
        rows, columns: Q_oldᵀ Q_new of each side; None for a side that stays.
    """
    seen = diagonal if rows is None else rows.square().mT @ diagonal
    return seen if columns is None else seen @ columns.square()


@contextlib.contextmanager
def full_precision(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Autocast off: its products would be those of low precision."""
    with contextlib.ExitStack() as stack:
        for device_type in {one.device.type for one in tensors}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
