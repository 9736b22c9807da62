"""What a step of :class:`SophiaK` does entry by entry: momenta, Adam's rule, adding the update to the parameter.

Beside products of small matrices it is these that cost time, so on a CPU each is one pass over memory, by loops that
numba compiles, where there is one for the tensors at hand. Elsewhere torch's operations do the same.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophia.optim import kernels, update
from sophia.optim.dtensor import is_dtensor, local, localise
from sophia.optim.kernels import cpu_matrix
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_update import ADAM_EPS, length_factor, scaled
from sophia.optim.rows import on_device


def fuses(device: torch.device) -> bool:
    """Whether there are loops for tensors on such a device, if numba is there."""
    return device.type == "cpu" and not kernels.interpreted()


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What of the optimizer and of this step they read and change."""

    states: Mapping[Tensor, Mapping[str, Any]]
    """Of the parameters that move; momenta among them."""
    scratch: update.Scratch
    """Memory for the arithmetic."""
    key: Callable[[Tensor], int]
    """Of a momentum's stochastic rounding."""
    time: int | Tensor
    """t, for that rounding."""
    grad_scale: Tensor | None
    """What gradients are to be divided by."""
    fused: Set[torch.device]
    """Where there are compiled loops that are worth it."""

    def gradient(self, one: Member) -> Tensor:
        """This rank's part of the gradient, as the rule takes it."""
        assert one.p.grad is not None
        g = localise(one.p.grad, one.p).to(update.compute_dtype(one.p))
        if self.grad_scale is not None:
            g = g / self.grad_scale.to(g.device)
        return -g if one.group["maximize"] else g

    def accumulate(self, one: Member) -> None:
        """m ← β1 m + (1 − β1) g."""
        assert one.p.grad is not None
        update.accumulate_momentum(
            [localise(one.p.grad, one.p)],
            [local(self.states[one.p]["exp_avg"])],
            beta1=one.group["betas"][0],
            maximize=one.group["maximize"],
            scratch=self.scratch,
            keys=[self.key(one.p)],
            step=self.time,
            grad_scale=None if self.grad_scale is None else self.grad_scale.to(one.p.device),
        )

    def along(self, one: Member) -> Tensor:
        """What a hidden matrix steps along, this rank's part, with its momentum up to date: m, or Nesterov's."""
        exact = update.compute_dtype(one.p)
        m, share = local(self.states[one.p]["exp_avg"]).to(exact), _ahead_share(one)
        return m.lerp(self.gradient(one), share) if share else m

    def accumulate_along(self, several: Sequence[Member], dtype: torch.dtype) -> Tensor:
        """:meth:`accumulate` and then :meth:`along`, of whole hidden matrices of a group and of one shape.

        Returns:
            [several, rows, columns], or [several, matrices, rows, columns] of weights that are several beside each
            other; of that dtype.
        """
        first = several[0]
        found = torch.empty((len(several), *first.p.shape), dtype=dtype, device=first.p.device)
        left: Iterable[int] = range(len(several))
        if self._fuses(first):
            left = cpu_matrix.ahead_(
                [one.p.grad for one in several if one.p.grad is not None],
                [self.states[one.p]["exp_avg"] for one in several],
                list(found),
                beta1=first.group["betas"][0],
                share=_ahead_share(first),
                **self._shared(several),
            )
        for index in left:
            self.accumulate(several[index])
            found[index].copy_(self.along(several[index]))
        if first.split == 1:
            return found
        if first.split_dim == 0:
            return found.unflatten(1, (first.split, -1))  # type: ignore[no-any-return, no-untyped-call]
        return torch.stack([first.parts(one) for one in found])

    def adam(self, members: Iterable[Member]) -> list[Member]:
        """A step of Adam's rule, momentum, average, decay and all, of parameters that there is a loop for.

        Returns:
            The others.
        """
        left: list[Member] = []
        alike: dict[int, list[Member]] = {}
        for one in members:
            own = self.states[one.p]
            if self._fuses(one) and not one.hidden and not one.samples_diagonal and "exp_avg_sq" in own:
                alike.setdefault(int(own["step"]), []).append(one)
            else:
                left.append(one)
        for count, several in alike.items():
            group, states = several[0].group, [self.states[one.p] for one in several]
            indices = cpu_matrix.adam_(
                [one.p.detach() for one in several],
                [one.p.grad for one in several if one.p.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                lr=float(group["lr"]),
                betas=group["betas"],
                nu=group["nu"],
                eps=ADAM_EPS,
                weight_decay=group["weight_decay"],
                count=count,
                **self._shared(several),
            )
            left += [several[index] for index in indices]
        return left

    def add_scaled(self, several: Sequence[Member], updates: Tensor, rms: float | None) -> None:
        """θ ← θ − η λ θ − η u, with u to a root mean square, of whole hidden matrices.

        Args:
            several: the matrices.
            updates: u, as of :meth:`accumulate_along`.
            rms: wanted, of each matrix; None leaves it as it is.
        """
        first = several[0]
        exact = update.compute_dtype(first.p)
        left: Collection[int] = range(len(several))
        if self._fuses(first) and (first.split == 1 or first.split_dim == 0):
            ones = torch.ones((), dtype=exact).expand(*updates.shape[:-2], 1, 1)
            factors = ones if rms is None else length_factor(updates, rms, exact)
            params = [one.parts(one.p.detach()) if one.split > 1 else one.p.detach()[None] for one in several]
            indices = cpu_matrix.add_(
                [part for parts in params for part in parts],
                list(updates.flatten(0, -3)),
                list(factors.flatten()),
                lr=float(first.group["lr"]),
                weight_decay=first.group["weight_decay"],
            )
            left = list(dict.fromkeys(index // first.split for index in indices))  # a weight's parts are alike
        if left:
            u = updates.to(exact) if rms is None else scaled(updates, rms, dtype=exact)
            for index in left:
                add(several[index], several[index].whole(u[index]))

    def _fuses(self, one: Member) -> bool:
        return one.p.device in self.fused and not is_dtensor(one.p)

    def _shared(self, several: Sequence[Member]) -> dict[str, Any]:
        """What loops over gradients and momenta take."""
        return {
            "maximize": several[0].group["maximize"],
            "keys": [self.key(one.p) for one in several],
            "step": self.time,
            "grad_scale": self.grad_scale,
        }


def _ahead_share(one: Member) -> float:
    """Of this step's gradient in what a hidden matrix steps along, beside its momentum."""
    return 1 - one.group["betas"][0] if one.group["nesterov"] else 0.0


def add(one: Member, u: Tensor) -> None:
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
