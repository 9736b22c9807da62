"""A step of :class:`SophiaK`: from momentum, gradient and diagonal to an update, in the basis of each matrix."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sophia.optim import kronecker, update
from sophia.optim.dtensor import local, localise, shards
from sophia.optim.eigenbasis import DecompositionError, full_precision, rotate
from sophia.optim.matrix_bounds import Bounds
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_rounds import gathered, rounds, scattered
from sophia.optim.matrix_update import adam, bound, direction, scaled
from sophia.optim.reach import Reach
from sophia.optim.replicas import Replicas
from sophia.optim.rows import on_device

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

    def move(self, members: Sequence[Member], grad_scale: Tensor | None) -> None:
        """Update parameters of a group, whose momenta have this step's gradients already.

        Args:
            members: the parameters.
            grad_scale: what their gradients are to be divided by.
        """
        with full_precision(one.p for one in members):
            self._move_others([one for one in members if not one.hidden], grad_scale)
            hidden = [one for one in members if one.hidden]
            for several in _alike(one for one in hidden if one.place is None):
                self._move_whole(several, [_gradient(one, grad_scale) for one in several])
            for several in rounds(one for one in hidden if one.place is not None):
                self._move_sharded(several, [_gradient(one, grad_scale) for one in several])

    def _move_others(self, members: Iterable[Member], grad_scale: Tensor | None) -> None:
        """Update parameters that are no hidden matrices, entry by entry, and what follows gradients in their state.

        Curvature that is not known holds them still.
        """
        shared: list[tuple[Member, Tensor]] = []
        for one in members:
            own, g, rms = self.states[one.p], _gradient(one, grad_scale), one.group["update_rms"]
            m, diagonal = local(own["exp_avg"]).to(g.dtype), self._diagonal(one, own, g)
            if one.p not in self.reach:
                continue
            if not one.samples_diagonal:
                _write(one, adam(_ahead(one, own, m, g), diagonal))
            elif rms is None or shards(one.p) == 1:
                divisor = bound(diagonal, kronecker.NO_BASIS, one.rule)
                u = direction(m.reshape(1, -1), divisor.reshape(1, -1), kronecker.NO_BASIS, one.rule)
                _write(one, u.reshape(m.shape))
            else:  # other shards count, too
                divisor = bound(diagonal, kronecker.NO_BASIS, one.rule)
                shared.append((one, direction(m, divisor, kronecker.NO_BASIS, replace(one.rule, update_rms=None))))
        if shared:
            replicas = self.replicas()
            parts = [u.square().sum() * (replicas.shard_weight(one.p) / one.p.numel()) for one, u in shared]
            for (one, u), mean_square in zip(shared, replicas.sum_shards(torch.stack(parts)), strict=True):
                _write(one, scaled(u, one.group["update_rms"], mean_square))

    def _move_whole(self, several: Sequence[Member], gradients: Sequence[Tensor]) -> None:
        """The same of hidden matrices of one shape, together: their products are small, and many.

        Args:
            several: the matrices.
            gradients: of each.
        """
        moving, along, diagonals = [], [], []
        exact, rule = update.compute_dtype(several[0].p), several[0].rule
        for one, g in zip(several, gradients, strict=True):
            diagonal = self._diagonal(one, self.states[one.p], g)
            if one.p in self.reach:
                moving.append(one)
                along.append(one.parts(_along(one, self.states[one.p], g)).to(rule.product_dtype or exact))
                diagonals.append(diagonal)
        if moving:
            bases = zip(*(kronecker.basis(self.states[one.p]) for one in moving), strict=True)
            rows, columns = (_stacked(side, along[0].ndim + 1) for side in bases)
            divisor = self.bounds.of(moving, self.states, diagonals, (rows, columns), rule)
            updates = direction(torch.stack(along), divisor, (rows, columns), rule, exact)
            for one, u in zip(moving, updates, strict=True):
                _write(one, one.whole(u))
        for one, g in zip(several, gradients, strict=True):
            self._follow(one, self.states[one.p], g)

    def _move_sharded(self, several: Sequence[Member], gradients: Sequence[Tensor]) -> None:
        """The same of matrices in shards, each of them where it is put together.

        Args:
            several: a round, of which at most one matrix is put together here.
            gradients: of the matrices, this rank's parts.
        """
        given = dict(zip((one.p for one in several), gradients, strict=True))
        mine = next((one for one in several if one.here), None)
        following = [one for one in several if one.follows_gradients]
        g = gathered(following, [given[one.p] for one in following])
        diagonal = None if mine is None else self._diagonal(mine, self.states[mine.p], g)
        moving = [one for one in several if one.p in self.reach]
        x = gathered(moving, [_along(one, self.states[one.p], given[one.p]) for one in moving])
        u = None
        if mine is not None and x is not None and diagonal is not None:
            basis = kronecker.basis(self.states[mine.p])
            u = mine.whole(direction(mine.parts(x), bound(diagonal, basis, mine.rule), basis, mine.rule))
        for one, part in zip(moving, scattered(moving, u, gradients[0]), strict=True):
            _write(one, part)
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
            kronecker.turn(own, one.parts(own[one.diagonal_name]))
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
            kronecker.turn(own, one.parts(own[one.diagonal_name]), bases)
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


def _stacked(side: Sequence[Tensor | None], ndim: int) -> Tensor | None:
    """The bases of one side of several matrices, with so many dimensions; of all or none there is one."""
    present = [one for one in side if one is not None]
    if not present:
        return None
    stacked = torch.stack(present)
    return stacked if stacked.ndim == ndim else stacked.unsqueeze(1)  # one for all parts of a weight


def _gradient(one: Member, grad_scale: Tensor | None) -> Tensor:
    """This rank's part of the gradient, as the rule takes it."""
    assert one.p.grad is not None
    g = localise(one.p.grad, one.p).to(update.compute_dtype(one.p))
    if grad_scale is not None:
        g = g / grad_scale.to(g.device)
    return -g if one.group["maximize"] else g


def _ahead(one: Member, own: Mapping[str, Any], m: Tensor, g: Tensor) -> Tensor:
    """What Adam's rule steps along: ν of the corrected momentum, and 1 − ν of this step's gradient."""
    nu: float = one.group["nu"]
    correction: float = 1 - one.group["betas"][0] ** int(own["step"])
    corrected = m / correction
    return corrected if nu == 1 else corrected.lerp_(g, 1 - nu)


def _along(one: Member, own: Mapping[str, Any], g: Tensor) -> Tensor:
    """What a hidden matrix steps along: of this rank's part, from momentum and gradient."""
    m = local(own["exp_avg"]).to(g.dtype)
    return m.lerp(g, 1 - one.group["betas"][0]) if one.group["nesterov"] else m


def _write(one: Member, u: Tensor) -> None:
    """θ ← θ − η λ θ − η u, of this rank's part."""
    p, lr = local(one.p), one.group["lr"]
    if isinstance(lr, Tensor):
        lr = on_device(lr.reshape(()), p.device)
    kept = 1 - lr * one.group["weight_decay"]
    if p.dtype == u.dtype:
        p.mul_(kept)
        if isinstance(lr, Tensor):
            p.sub_(lr * u)
        else:
            p.add_(u, alpha=-lr)
    else:
        update.write(p, p.to(u.dtype) * kept - lr * u)
