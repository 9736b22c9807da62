"""SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3): Adam in the eigenbasis of Shampoo's statistics.

A baseline. Rule (`SOAP.step`), statistics and basis (`eigenbasis`) are apart.
"""

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sophia.optim.dtensor import is_dtensor
from sophia.optim.eigenbasis import eigenvectors, fold_outer, power_iteration, rotate, rotate_back

State = dict[str, Tensor]

# The paper's limit: beyond it a side's basis costs more than it brings.
LARGEST = 10_000


class SOAP(Optimizer):
    """Adam on gradients that are turned into a slowly moving eigenbasis, matrix by matrix.

        ĝ ← Q_Rᵀ g Q_C
        m ← β1 m + (1 − β1) ĝ
        v ← β2 v + (1 − β2) ĝ²
        u ← m / (1 − β1ᵗ) / (√(v / (1 − β2ᵗ)) + ε)
        θ ← θ − η λ θ
        θ ← θ − η Q_R u Q_Cᵀ
        L ← β2 L + (1 − β2) g gᵀ,  R ← β2 R + (1 − β2) gᵀ g
        every k steps: Q_R ← qr(L Q_R), Q_C ← qr(R Q_C); m is turned from the old basis into the new one, v moves with
        the columns, where their order changes

    The paper turns m in every step; that it stays in the basis here is the same, at two thirds of the products.

    The first basis is made of the first gradient's eigenvectors, after the first step: in the basis of the very
    gradient that is being taken, rounding errors would be divided by rounding errors. So the first step is Adam's; the
    authors' code leaves it out instead. A dimension larger than ``max_precond_dim`` is not turned, and vectors are
    Adam's throughout.

    Args:
        params: matrices, vectors and scalars, or param groups, in fp32 or fp64.
        lr: η.
        betas: (β1, β2), of the momentum, and of squares and statistics.
        eps: ε.
        weight_decay: λ, decoupled.
        basis_interval: k.
        max_precond_dim: largest dimension that is turned; it costs two square matrices of that size.

    State of a parameter: `step`, `exp_avg` (m), `exp_avg_sq` (v), and of a matrix, for each side that is turned,
    `row_statistics` (L) and `row_basis` (Q_R), `column_statistics` (R) and `column_basis` (Q_C).

    Raises:
        ValueError: a setting is out of its range, or a parameter of a kind that this has no meaning for.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        basis_interval: int = 10,
        max_precond_dim: int = LARGEST,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}; both must be at least 0 and below 1")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be finite and at least 0")
        for name, value in (("basis_interval", basis_interval), ("max_precond_dim", max_precond_dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "basis_interval": basis_interval, "max_precond_dim": max_precond_dim})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take more parameters, see :class:`SOAP`."""
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                _check(p)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step from the gradients in `.grad`; ``closure`` computes them anew and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state(p, group["max_precond_dim"])
                update = _adam(p.grad, state, beta1=beta1, beta2=beta2, eps=eps)
                p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)
                if p.ndim == 2:
                    _move_basis(p.grad, state, beta=beta2, interval=group["basis_interval"])
        return loss

    def _state(self, p: Tensor, largest: int) -> State:
        state: State = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if p.ndim == 2:
                for side, size in zip(("row", "column"), p.shape, strict=True):
                    if size <= largest:
                        state[f"{side}_statistics"] = p.new_zeros(size, size)
        return state


def _adam(g: Tensor, state: State, *, beta1: float, beta2: float, eps: float) -> Tensor:
    """Adam's update for a learning rate of one, computed in the parameter's basis and turned back."""
    basis = _basis(state)
    state["step"] += 1
    t = int(state["step"])
    turned = rotate(g, *basis)
    state["exp_avg"].lerp_(turned, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
    deviation = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(eps)
    return rotate_back(state["exp_avg"] / deviation.mul_(1 - beta1**t), *basis)


def _basis(state: State) -> tuple[Tensor | None, Tensor | None]:
    """Of rows and columns; None where a side is not turned, or not yet."""
    return state.get("row_basis"), state.get("column_basis")


def _move_basis(g: Tensor, state: State, *, beta: float, interval: int) -> None:
    """Fold a gradient into a matrix's statistics; make its first basis after the first step, move it when due."""
    fold_outer(state.get("row_statistics"), state.get("column_statistics"), g, 1 - beta)
    step = int(state["step"])
    sides = [(axis, side) for axis, side in enumerate(("row", "column")) if f"{side}_statistics" in state]
    if not sides or (step > 1 and step % interval):
        return
    average = rotate_back(state["exp_avg"], *_basis(state))
    if step == 1:
        for _, side in sides:
            state[f"{side}_basis"] = eigenvectors(state[f"{side}_statistics"])
        # The one gradient so far is still here: its squares can be taken in the new basis, too.
        state["exp_avg_sq"] = rotate(g, *_basis(state)).square_().mul_(1 - beta)
    else:
        for axis, side in sides:
            basis, order = power_iteration(state[f"{side}_statistics"], state[f"{side}_basis"])
            state[f"{side}_basis"] = basis
            state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)
    state["exp_avg"] = rotate(average, *_basis(state))


def _check(p: Tensor) -> None:
    if is_dtensor(p):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is a DTensor: SOAP needs whole matrices; use DDP, or another "
            "optimizer"
        )
    if p.ndim > 2:
        raise ValueError(f"a parameter of shape {tuple(p.shape)}: SOAP takes matrices and vectors; view it as a matrix")
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a parameter in {p.dtype}: SOAP needs fp32 or fp64; compute in bf16 by torch.autocast")
