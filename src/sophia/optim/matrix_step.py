"""A step of :class:`SophiaK`: from momentum, gradient and diagonal to an update, in the basis of each matrix."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sophia.optim import kronecker, update
from sophia.optim.dtensor import local, shards
from sophia.optim.eigenbasis import DecompositionError, full_precision, rotate
from sophia.optim.matrix_bounds import Bounds
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_passes import Passes, add
from sophia.optim.matrix_rounds import gathered, rounds, scattered
from sophia.optim.matrix_update import adam, bound, direction, scaled, unscaled
from sophia.optim.reach import Reach
from sophia.optim.replicas import Replicas

# Elements of matrices that are turned together: on a GPU, which waits for launches, three of gpt2-small's largest; on a
# CPU what its cache holds.
TOGETHER = 1 << 23
TOGETHER_ON_CPU = 1 << 20


@dataclass(frozen=True, kw_only=True)
class MatrixStep:
    """What of the optimizer a step reads and changes."""

    states: Mapping[Tensor, dict[str, Any]]
    """Of the parameters that move."""
    reach: Reach
    """Which parameters curvature has reached: others hold still."""
    unturned: set[Tensor]
    """Matrices that have averages, but no bases yet."""
    interval: int
    """Steps from one basis of gradients to the next."""
    replicas: Callable[[], Replicas]
    """Gives the ranks."""
    bounds: Bounds
    """Of the steps before."""
    passes: Passes
    """Over memory."""

    def move(self, members: Sequence[Member]) -> None:
        """Update parameters of a group and their momenta. Curvature that is not known holds parameters still."""
        with full_precision(one.p for one in members):
            self._move_others(self.passes.adam(one for one in members if not one.hidden))
            hidden = [one for one in members if one.hidden]
            for several in _alike(one for one in hidden if one.place is None):
                self._move_whole(several)
            for several in rounds(one for one in hidden if one.place is not None):
                self._move_sharded(several)

    def _move_others(self, members: Iterable[Member]) -> None:
        """Update parameters that are no hidden matrices, entry by entry, and what follows gradients in their state."""
        shared: list[tuple[Member, Tensor]] = []
        for one in members:
            self.passes.accumulate(one)
            own, g, rms = self.states[one.p], self.passes.gradient(one), one.group["update_rms"]
            m, diagonal = local(own["exp_avg"]).to(g.dtype), self._diagonal(one, own, g)
            if one.p not in self.reach:
                continue
            if not one.samples_diagonal:
                add(one, adam(_ahead(one, own, m, g), diagonal))
            elif rms is None or shards(one.p) == 1:
                divisor = bound(diagonal, kronecker.NO_BASIS, one.rule)
                u = direction(m.reshape(1, -1), divisor.reshape(1, -1), kronecker.NO_BASIS, one.rule)
                add(one, u.reshape(m.shape))
            else:  # other shards count, too
                divisor = bound(diagonal, kronecker.NO_BASIS, one.rule)
                shared.append((one, direction(m, divisor, kronecker.NO_BASIS, replace(one.rule, update_rms=None))))
        if shared:
            replicas = self.replicas()
            parts = [u.square().sum() * (replicas.shard_weight(one.p) / one.p.numel()) for one, u in shared]
            for (one, u), mean_square in zip(shared, replicas.sum_shards(torch.stack(parts)), strict=True):
                add(one, scaled(u, one.group["update_rms"], mean_square))

    def _move_whole(self, several: Sequence[Member]) -> None:
        """The same of hidden matrices of one shape, together: their products are small, and many."""
        given = {one.p: self.passes.gradient(one) for one in several if one.follows_gradients}
        diagonals = {one.p: self._diagonal(one, self.states[one.p], given.get(one.p)) for one in several}
        moving = [one for one in several if one.p in self.reach]
        if moving:
            rule = moving[0].rule
            low = rule.product_dtype or update.compute_dtype(moving[0].p)
            x = self.passes.accumulate_along(moving, low)
            basis = self.bounds.bases(moving, self.states, low)
            divisor = self.bounds.of(moving, self.states, [diagonals[one.p] for one in moving], basis, rule)
            self.passes.add_scaled(moving, unscaled(x, divisor.to(low), basis, rule), rule.update_rms)
        for one in several:
            if one.p not in self.reach:
                self.passes.accumulate(one)
            if one.p in given:
                self._follow(one, self.states[one.p], given[one.p])

    def _move_sharded(self, several: Sequence[Member]) -> None:
        """The same of matrices in shards, each of them where it is put together.

        Args:
            several: a round, of which at most one matrix is put together here.
        """
        for one in several:
            self.passes.accumulate(one)
        given = {one.p: self.passes.gradient(one) for one in several}
        mine = next((one for one in several if one.here), None)
        following = [one for one in several if one.follows_gradients]
        g = gathered(following, [given[one.p] for one in following])
        diagonal = None if mine is None else self._diagonal(mine, self.states[mine.p], g)
        moving = [one for one in several if one.p in self.reach]
        x = gathered(moving, [self.passes.along(one) for one in moving])
        u = None
        if mine is not None and x is not None and diagonal is not None:
            basis = kronecker.basis(self.states[mine.p])
            u = mine.whole(direction(mine.parts(x), bound(diagonal, basis, mine.rule), basis, mine.rule))
        for one, part in zip(moving, scattered(moving, u, given[several[0].p]), strict=True):
            add(one, part)
        if mine is not None and g is not None:
            self._follow(mine, self.states[mine.p], g)

    def _diagonal(self, one: Member, own: dict[str, Any], g: Tensor | None) -> Tensor:
        """D of its parts, after this step's gradient where it is made of gradients."""
        if one.samples_diagonal:
            return one.parts(local(own["hessian"]).to(update.compute_dtype(one.p)))
        assert g is not None
        beta2, t = one.group["betas"][1], int(own["step"])
        turned = one.whole(rotate(one.parts(g), *kronecker.basis(own)))
        if "exp_avg_sq" not in own:  # since 1 - beta2^t corrects an average of t
            own["exp_avg_sq"] = one.zeros("exp_avg_sq", g.dtype)
            local(own["exp_avg_sq"]).addcmul_(turned, turned, value=1 - beta2 ** (t - 1))
        average = local(own["exp_avg_sq"]).mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
        corrected: Tensor = average / (1 - beta2**t)
        return one.parts(corrected)

    def _follow(self, one: Member, own: dict[str, Any], g: Tensor) -> None:
        """Fold a gradient into statistics made of gradients, and move their bases when due."""
        if not any(one.sides) or one.group["factors"] != "gradients":
            return
        beta2, t = one.group["betas"][1], int(own["step"])
        kronecker.fold_gradient(own, one.parts(g), 1 - beta2)
        if t > 1 and t % self.interval:
            return
        if t > 1 and one.p not in self.unturned:
            kronecker.turn(own, one.parts(own[one.diagonal_name]), None, one.product_dtype)
            return
        try:
            bases = kronecker.eigenbasis(own)
        except DecompositionError:
            self.unturned.add(one.p)  # it is tried again when the next is due
            shape = tuple(one.p.shape)
            warnings.warn(f"no eigenvectors were found for a matrix of shape {shape}: it keeps its basis", stacklevel=5)
            return
        self.unturned.discard(one.p)
        if one.samples_diagonal or t > 1:
            kronecker.turn(own, one.parts(own[one.diagonal_name]), bases, one.product_dtype)
        else:  # the one gradient so far is still here: its squares in the new basis
            kronecker.turn(own, None, bases)
            own["exp_avg_sq"] = one.whole(rotate(one.parts(g), *bases).square_().mul_(1 - beta2))


def _alike(members: Iterable[Member]) -> Iterable[Sequence[Member]]:
    """Matrices of a group that are alike in shape, dtype and device, but not so many that copies of them weigh."""
    found: dict[Any, list[Member]] = {}
    for one in members:
        kind = (one.p.shape, update.compute_dtype(one.p), one.p.device)
        several = found.setdefault(kind, [])
        if (len(several) + 1) * one.p.numel() > together(one.p.device.type) and several:
            yield several
            several = found[kind] = []
        several.append(one)
    yield from found.values()


def together(device_type: str) -> int:
    """Elements of matrices that are turned together on "cpu", "cuda" and so on."""
    return TOGETHER_ON_CPU if device_type == "cpu" else TOGETHER


def _ahead(one: Member, own: Mapping[str, Any], m: Tensor, g: Tensor) -> Tensor:
    """What Adam's rule steps along: ν of the corrected momentum, and 1 − ν of this step's gradient."""
    nu: float = one.group["nu"]
    correction: float = 1 - one.group["betas"][0] ** int(own["step"])
    corrected = m / correction
    return corrected if nu == 1 else corrected.lerp_(g, 1 - nu)
