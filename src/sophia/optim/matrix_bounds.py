"""What hidden matrices' momenta are turned by and clipped at, kept from step to step: sampled curvature changes at
refreshes alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from sophia.optim import kronecker
from sophia.optim.dtensor import local
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_update import Basis, MatrixRule, bound

# Elements of the largest matrix of which this is kept, two to three megabytes in bf16 beside its state. Of larger ones
# products cost the most, and memory counts.
LARGEST = 1 << 20

_Kept = TypeVar("_Kept")


class Bounds:
    """max(γ Dᵖ, ε) and bases of matrices that are turned together, as long as nothing that they are made of changes."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Tensor], tuple[Any, Sequence[Tensor], Any]] = {}

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    def bases(self, members: Sequence[Member], states: Mapping[Tensor, Mapping[str, Any]], dtype: torch.dtype) -> Basis:
        """Q_R and Q_C of these matrices, stacked, in the dtype in which they turn.

        Args:
            members: the matrices, alike.
            states: theirs.
            dtype: of the products.
        """
        sides = list(zip(*(kronecker.basis(states[one.p]) for one in members), strict=True))
        ndim = 3 if members[0].split == 1 else 4

        def computed() -> Basis:
            return _stacked(sides[0], ndim, dtype), _stacked(sides[1], ndim, dtype)

        if members[0].p.numel() > LARGEST:
            return computed()
        return self._as_long(
            "bases", members[0], [one for side in sides for one in side if one is not None], dtype, computed
        )

    def of(
        self,
        members: Sequence[Member],
        states: Mapping[Tensor, Mapping[str, Any]],
        diagonals: Sequence[Tensor],
        basis: Basis,
        rule: MatrixRule,
    ) -> Tensor:
        """`bound` of these matrices, stacked, in the dtype in which it divides.

        Args:
            members: the matrices, alike.
            states: theirs.
            diagonals: D of each, in parts.
            basis: tells the sides that are turned.
            rule: the settings.
        """
        first = members[0]

        def computed() -> Tensor:
            found = bound(torch.stack(list(diagonals)), basis, rule)
            return found if rule.product_dtype is None else found.to(rule.product_dtype)

        if not first.samples_diagonal or first.p.numel() > LARGEST:
            return computed()
        sources = [local(states[one.p]["hessian"]) for one in members]
        made_of = (rule, [side is None for side in basis], diagonals[0].shape)
        return self._as_long("divisor", first, sources, made_of, computed)

    def _as_long(
        self, kind: str, first: Member, sources: Sequence[Tensor], made_of: Any, computed: Callable[[], _Kept]
    ) -> _Kept:
        """What was computed last, unless a source or what else it is made of is another now."""
        if any(source.is_inference() for source in sources):  # these do not tell when they change
            return computed()
        now = ([(id(source), source._version) for source in sources], made_of)
        known = self._kept.get((kind, first.p))
        if known is None or known[0] != now:
            # The sources are kept, too: else another tensor could come to have the id of one that is gone.
            known = self._kept[kind, first.p] = now, sources, computed()
        result: _Kept = known[2]
        return result


def _stacked(side: Sequence[Tensor | None], ndim: int, dtype: torch.dtype) -> Tensor | None:
    """The bases of one side of several matrices, with so many dimensions; of all or none there is one."""
    present = [one.to(dtype) for one in side if one is not None]
    if not present:
        return None
    stacked = torch.stack(present)
    return stacked if stacked.ndim == ndim else stacked.unsqueeze(1)  # one for all parts of a weight
