"""A matrix's curvature in its own basis: from sampled gradients to Kronecker factors, eigenvectors and a diagonal.

For a weight matrix with sampled gradients S_c (of summed losses over chunk c, N predictions in all), the Gauss-Newton
matrix of the mean loss has 1/N Σ_c S_c S_cᵀ and 1/N Σ_c S_cᵀ S_c as its factors over rows and columns (Martens and
Grosse 2015, arXiv 1503.05671, take them from activations instead), and in the basis of their eigenvectors the diagonal
1/N Σ_c (Q_Rᵀ S_c Q_C)² (George et al. 2018, arXiv 1806.03884).

In a parameter's state: `row_statistics` [rows, rows] and `row_basis`, `column_statistics` [columns, columns] and
`column_basis`, for the sides that are turned. A weight that is several matrices beside each other (`parts`) has those
of their own side for each, [matrices, rows, rows], and those of the other side, their common inputs, once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sophia.optim.eigenbasis import carried, eigenvectors, fold_outer, outer, power_iteration, rotate
from sophia.optim.matrix_update import Basis

Sides = Literal["both", "smaller", "none"]
SIDES: tuple[str, ...] = ("both", "smaller", "none")
NO_BASIS: Basis = (None, None)


def turned(shape: Sequence[int], sides: str, largest: int, tie: int = 0) -> tuple[bool, bool]:
    """Which of a matrix's two sides, rows and columns, have a basis.

    Args:
        shape: of the matrix, or of each of several.
        sides: "both", "smaller" or "none".
        largest: size of a side beyond which it is left alone.
        tie: which one counts as the smaller where they are equal, 0 for rows.
    """
    rows, columns = shape[-2:]
    if sides == "none":
        return False, False
    if sides == "smaller":
        smaller = tie if rows == columns else int(columns < rows)
        return smaller == 0 and rows <= largest, smaller == 1 and columns <= largest
    return rows <= largest, columns <= largest


def parts(x: Tensor, count: int, dim: int) -> Tensor:
    """A weight as the matrices that lie in it beside each other, a view: [count, rows, columns].

    Args:
        x: [rows, columns].
        count: of the matrices.
        dim: along which they lie, 0 or 1.
    """
    cut: Tensor = x.unflatten(dim, (count, x.shape[dim] // count))  # type: ignore[no-untyped-call]
    return cut if dim == 0 else cut.movedim(1, 0)


def whole(several: Tensor, dim: int) -> Tensor:
    """The way back from :func:`parts`."""
    return several.flatten(0, 1) if dim == 0 else several.movedim(0, 1).flatten(1, 2)


def basis(state: Mapping[str, Any]) -> Basis:
    """Of rows and columns; None where a side is not turned."""
    return state.get("row_basis"), state.get("column_basis")


def fold_gradient(state: Mapping[str, Any], gradient: Tensor, weight: float) -> None:
    """Move the statistics towards those of one gradient, in place: S ← (1 − w) S + w G Gᵀ."""
    fold_outer(state.get("row_statistics"), state.get("column_statistics"), gradient, weight)


def turn(
    state: dict[str, Any],
    diagonal: Tensor | None,
    bases: Basis | None = None,
    product_dtype: torch.dtype | None = None,
) -> None:
    """Move the bases of a matrix, and take the diagonal along.

    Args:
        state: of the matrix; its bases are replaced.
        diagonal: [rows, columns], or of its parts, changed in place.
        bases: the new ones; None follows the eigenvectors of the statistics by one step of orthogonal iteration.
        product_dtype: in which the diagonal is carried over; None is that of the bases.
    """
    overlaps: list[Tensor | None] = []
    for place, side in enumerate(("row", "column")):
        old = state.get(f"{side}_basis")
        new = None if bases is None else bases[place]
        if old is not None and bases is None:
            new = power_iteration(state[f"{side}_statistics"], old)[0]
        if new is not None:
            state[f"{side}_basis"] = new
        overlaps.append(None if old is None or new is None else old.mT @ new)
    if diagonal is not None:
        seen, sides = _lowered(diagonal.to(_dtype(overlaps, diagonal)), overlaps, product_dtype)
        diagonal.copy_(carried(seen, *sides))


def eigenbasis(state: Mapping[str, Any]) -> Basis:
    """All eigenvectors of the statistics."""
    rows, columns = (state.get(f"{side}_statistics") for side in ("row", "column"))
    return (None if rows is None else eigenvectors(rows), None if columns is None else eigenvectors(columns))


def _dtype(matrices: Iterable[Tensor | None], other: Tensor) -> torch.dtype:
    """That of the matrices, or of the other tensor where there are none."""
    return next((one.dtype for one in matrices if one is not None), other.dtype)


def _lowered(x: Tensor, sides: Iterable[Tensor | None], dtype: torch.dtype | None) -> tuple[Tensor, Basis]:
    """X and what it is multiplied by, in the dtype of the products; x as it is where there are none."""
    rows, columns = sides
    if dtype is None or (rows is None and columns is None):
        return x, (rows, columns)
    return x.to(dtype), (None if rows is None else rows.to(dtype), None if columns is None else columns.to(dtype))


@dataclass
class Sums:
    """What a refresh adds up for one parameter, in at least fp32."""

    basis: Basis = NO_BASIS
    """The bases in which squares are taken."""
    sides: tuple[bool, bool] = (False, False)
    """Of which sides, rows and columns, outer products are wanted."""
    shared: tuple[bool, bool] = (False, False)
    """Of which of them there is one for all parts of the weight."""
    diagonal: bool = False
    """Whether squares are wanted."""
    product_dtype: torch.dtype | None = None
    """In which gradients are turned for them; None is that of the bases."""
    outer: dict[str, Tensor] = field(default_factory=dict)
    """`row`: Σ_c S_c S_cᵀ, `column`: Σ_c S_cᵀ S_c, of the sides that are turned."""
    squares: Tensor | None = None
    """Σ_c (Q_Rᵀ S_c Q_C)²."""
    reached: bool = False
    """Whether there was a gradient at all."""

    @property
    def wants_any(self) -> bool:
        """Whether anything is added up."""
        return self.diagonal or any(self.sides)

    def add(self, gradient: Tensor) -> None:
        """One chunk's gradient S_c, [rows, columns], or of its parts."""
        self.reached = True
        gradient = gradient.to(_dtype(self.basis, gradient))
        for side, wanted, shared in zip(("row", "column"), self.sides, self.shared, strict=True):
            if wanted:
                matrix = gradient if side == "row" else gradient.mT
                self._add_outer(side, matrix, one_for_all=shared)
        if self.diagonal:
            low, basis = _lowered(gradient, self.basis, self.product_dtype)
            seen = rotate(low, *basis).to(gradient.dtype)
            self.squares = seen * seen if self.squares is None else self.squares.addcmul_(seen, seen)

    def _add_outer(self, side: str, matrix: Tensor, *, one_for_all: bool) -> None:
        known = self.outer.get(side)
        if known is not None and matrix.ndim == 2:
            known.addmm_(matrix, matrix.T)
            return
        found = outer(matrix, one_for_all=one_for_all)
        self.outer[side] = found if known is None else known.add_(found)

    def fold_factors(self, state: Mapping[str, Any], *, weight: float, scale: float) -> None:
        """Move a parameter's statistics towards these, in place: S ← (1 − w) S + w · scale · Σ."""
        for side, total in self.outer.items():
            state[f"{side}_statistics"].mul_(1 - weight).add_(total, alpha=weight * scale)

    def eigenbasis(self) -> Basis:
        """Of the outer products."""
        rows, columns = (self.outer.get(side) for side in ("row", "column"))
        return (None if rows is None else eigenvectors(rows), None if columns is None else eigenvectors(columns))

    def tensors(self) -> Iterator[Tensor]:
        """All that was added up."""
        yield from self.outer.values()
        if self.squares is not None:
            yield self.squares
