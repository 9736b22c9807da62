"""Where hidden matrices' momenta are clipped, kept from step to step: sampled curvature changes at refreshes alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.optim.dtensor import local
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_update import Basis, MatrixRule, bound

# Elements of the largest matrix whose bound is kept, two megabytes in bf16 beside its state. Of larger ones products
# cost the most, and memory counts.
LARGEST = 1 << 20


class Bounds:
    """max(γ Dᵖ, ε) of matrices that are turned together, as long as nothing that it is made of changes."""

    def __init__(self) -> None:
        self._kept: dict[Tensor, tuple[Any, Sequence[Tensor], Tensor]] = {}

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

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
        if any(source.is_inference() for source in sources):  # these do not tell when they change
            return computed()
        changes = [(id(source), source._version) for source in sources]
        made_of = (changes, rule, [side is None for side in basis], diagonals[0].shape)
        if first.p not in self._kept or self._kept[first.p][0] != made_of:
            # The sources are kept, too: else another tensor could come to have the id of one that is gone.
            self._kept[first.p] = made_of, sources, computed()
        return self._kept[first.p][2]
