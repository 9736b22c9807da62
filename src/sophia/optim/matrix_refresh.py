"""A refresh of :class:`SophiaK`: sampled gradients, chunk by chunk, become statistics, bases and diagonals."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sophia.optim import checks, kronecker, state, update
from sophia.optim.clock import Clock
from sophia.optim.dtensor import is_dtensor, local, localise, shard
from sophia.optim.eigenbasis import DecompositionError, full_precision
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_rounds import gathered, rounds
from sophia.optim.matrix_update import Basis
from sophia.optim.reach import Reach
from sophia.optim.replicas import Replicas

Chunks: TypeAlias = Iterable[tuple[Sequence[Tensor | None], int]]


@dataclass(frozen=True, kw_only=True)
class MatrixRefresh:
    """All parameters, and what of the optimizer a refresh reads and changes."""

    members: Sequence[Member]
    """In the order of the groups."""
    states: Mapping[Tensor, Mapping[str, Any]]
    """Of the parameters that have one."""
    begin: Callable[[Member], dict[str, Any]]
    """Gives a parameter's state, with nothing missing."""
    unturned: set[Tensor]
    """Matrices that have averages, but no bases yet."""
    reach: Reach
    """Which parameters curvature has reached."""
    clock: Clock
    """Counts refreshes."""
    replicas: Replicas
    """The ranks."""
    scratch: update.Scratch
    """Memory for the arithmetic."""
    key: Callable[[Tensor], int]
    """Of a diagonal's stochastic rounding."""

    @property
    def _params(self) -> list[Tensor]:
        return [one.p for one in self.members]

    @torch.no_grad()
    def fold(self, chunks: Callable[[], Chunks]) -> bool:
        """Fold sampled gradients in, unless one is not finite on some rank.

        Args:
            chunks: gives the sampled gradients of all parameters and their counts, chunk by chunk, as often as it is
                called. That is twice where matrices get their first bases: for these, and for what is measured in them.
        """
        first: dict[Tensor, Basis] = {}
        starting = {
            one.p
            for one in self.members
            if any(one.sampled_sides) and (one.p in self.unturned or not refreshed(self.states, one.p))
        }
        sums = {one.p: self._begun(one, first, factors_only=one.p in starting) for one in self.members}
        total = self._add_up(sums, chunks())
        if not self._accepted(sums):
            return False
        if any(sums[p].reached for p in starting):  # a matrix that no gradient ever reaches costs nothing
            found = self._first_bases(sums, starting)
            if not self.replicas.everywhere(found is not None, self.members[0].p.device):
                self.clock.refuse()
                return False
            first = found or {}
            sums = {one.p: self._begun(one, first) for one in self.members}
            total = self._add_up(sums, chunks())
            if not self._accepted(sums):
                return False
        with full_precision(self._params):
            for one in self.members:
                if sums[one.p].reached:
                    self._fold_one(one, sums[one.p], 1 / total, first.get(one.p))
        self.unturned.difference_update(p for p in starting if sums[p].reached)
        self.reach.update(p for p, one in sums.items() if one.reached)
        self.clock.accept()
        return True

    def _first_bases(self, sums: Mapping[Tensor, kronecker.Sums], starting: set[Tensor]) -> dict[Tensor, Basis] | None:
        """Of those matrices that are to get one, and are here; None where eigenvectors were not found."""
        with full_precision(self._params):
            found = [one for one in self.members if one.p in starting and one.here and sums[one.p].reached]
            try:
                return {one.p: sums[one.p].eigenbasis() for one in found}
            except DecompositionError:
                return None

    def _begun(self, one: Member, first: Mapping[Tensor, Basis], *, factors_only: bool = False) -> kronecker.Sums:
        """Nothing yet of what a parameter wants, in its first basis or else the one that it has."""
        return kronecker.Sums(
            basis=first.get(one.p) or kronecker.basis(self.states.get(one.p, {})),
            sides=one.sampled_sides,
            shared=one.shared,
            diagonal=one.samples_diagonal and not factors_only,
            product_dtype=one.product_dtype,
        )

    def _add_up(self, sums: Mapping[Tensor, kronecker.Sums], chunks: Chunks) -> int:
        """Add all chunks to the sums; returns their predictions."""
        total = 0
        for gradients, count in chunks:
            total += count
            with full_precision(self._params):  # around the arithmetic, not around the forward of the next chunk
                self._add_chunk(sums, gradients)
            del gradients  # not beside those of the next chunk
        return total

    def _add_chunk(self, sums: Mapping[Tensor, kronecker.Sums], gradients: Sequence[Tensor | None]) -> None:
        found = {p: g for p, g in zip(self._params, gradients, strict=True) if g is not None and p in sums}
        members = [one for one in self.members if one.p in found]
        for one in members:
            sums[one.p].reached = True
        for several in rounds(one for one in members if sums[one.p].wants_any):
            whole = gathered(several, [found[one.p] for one in several])
            for one in several:
                if one.here and whole is not None:
                    sums[one.p].add(one.parts(whole))

    def _accepted(self, sums: Mapping[Tensor, kronecker.Sums]) -> bool:
        finite = checks.all_finite(total for one in sums.values() for total in one.tensors())
        if self.replicas.everywhere(finite, self.members[0].p.device):
            return True
        self.clock.refuse()
        return False

    def _fold_one(self, one: Member, sums: kronecker.Sums, scale: float, first: Basis | None) -> None:
        own = self.begin(one)
        decay = state.count_estimate(own, one.group["betas"][1])
        if not one.here:
            return
        sums.fold_factors(own, weight=1 - decay if first is None else 1.0, scale=scale)
        diagonal = own.get(one.diagonal_name)
        if first is not None:  # what was averaged before, of gradients or by SophiaG, was averaged in others
            averaged = not one.samples_diagonal or int(own["refreshes"]) > 1
            kronecker.turn(
                own, one.parts(diagonal) if averaged and diagonal is not None else None, first, one.product_dtype
            )
        if sums.squares is not None:
            update.fold_curvature(
                [local(own["hessian"])],
                [one.whole(sums.squares)],
                beta2=decay,
                scale=scale,
                scratch=self.scratch,
                keys=[self.key(one.p)],
                step=self.clock.time,
            )
        if any(one.sampled_sides) and first is None:
            kronecker.turn(own, None if diagonal is None else one.parts(diagonal), None, one.product_dtype)


def refreshed(states: Mapping[Tensor, Mapping[str, Any]], p: Tensor) -> bool:
    """Whether an estimate was ever folded into a parameter's state."""
    return p in states and float(states[p].get("refreshes", 0)) > 0


def as_chunks(estimates: Sequence[Tensor | None], params: Sequence[Tensor], matrices: set[Tensor]) -> Iterator[Any]:
    """Estimates as sampled gradients: a diagonal is the square of its root, in the first chunk."""
    given = [(e, p, p in matrices) for e, p in zip(estimates, params, strict=True)]
    longest = max((len(e) for e, _, stacked in given if e is not None and stacked), default=1)
    for number in range(longest):
        gradients: list[Tensor | None] = []
        for e, p, stacked in given:
            if e is None or number >= (len(e) if stacked else 1):
                gradients.append(None)
                continue
            whole = e.full_tensor() if stacked and is_dtensor(e) else e
            part = shard(whole[number], p) if stacked else localise(e, p)
            exact = part.to(device=p.device, dtype=state.dtype_of_state(p, None))
            gradients.append(exact if stacked else exact.sqrt())
        yield gradients, 1 if number == 0 else 0
