"""Sophia in the curvature's own basis: rotated, clipped and, if wanted, orthogonalized updates of weight matrices."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sophia.optim import checks, fsdp, kronecker, matrix_checks, refresh, rounding, state, stats, update
from sophia.optim.curvature import GaussNewtonBartlett
from sophia.optim.eigenbasis import rotate
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_update import Basis, adam, bound, direction
from sophia.optim.replicas import Replicas
from sophia.optim.variants import SophiaG

Source = Literal["curvature", "gradients"]
Chunks: TypeAlias = Iterable[tuple[Sequence[Tensor | None], int]]


class SophiaK(SophiaG):
    """Sophia in the curvature's own basis, matrix by matrix (ours; docs/lab-notes.md tells how it was found).

    Every k steps a sub-batch gives sampled Gauss-Newton gradients S_c, as for :class:`SophiaG`. Of a hidden layer's
    matrix they give the Kronecker factors Σ S_c S_cᵀ / N and Σ S_cᵀ S_c / N, whose eigenvectors Q_R and Q_C are a basis
    in which curvature is nearly diagonal, and that diagonal D. In each step

        m ← β1 m + (1 − β1) g
        u ← clip(Q_Rᵀ m Q_C / max(γ Dᵖ, ε), ±1)
        u ← Q_R u Q_Cᵀ, orthogonalized by Newton-Schulz steps, scaled to a root mean square of 0.2
        θ ← θ − η λ θ − η u

    All else (embeddings, the output head, vectors) takes Adam's rule or Sophia's, see `others`. Refreshes, clock,
    attach, groups and state dicts are those of :class:`Sophia`. With the identity as basis, p = 1, no orthogonalization
    and `update_rms=None` it is SophiaG with bias-corrected curvature.

    Args:
        params: as for :class:`Sophia`; give embeddings and the output head in a group of their own with
            ``"hidden": False``.
        lr: η, of the size of AdamW's: all updates have about AdamW's root mean square.
        betas: (β1, β2), of the momentum per step, and of curvature per refresh (of gradients' statistics per step).
        gamma: γ of the clip, a number.
        eps: ε, the least denominator.
        weight_decay: λ, decoupled.
        curvature_interval: k, steps from one refresh, and from one basis, to the next.
        hidden: whether a group's matrices are those of hidden layers, which get a basis.
        basis: the sides of a matrix that are turned: "both", the "smaller" one, or "none".
        factors: what the bases are made of: sampled "curvature" at refreshes, or the "gradients" of all steps (as in
            SOAP, Vyas et al. 2024, arXiv 2409.11321).
        diagonal: what D is made of: sampled "curvature", or squares of the "gradients" of all steps.
        exponent: p, of D: 1 is Newton's, ½ Adam's.
        clip: whether coordinates of hidden matrices are clipped, in the basis.
        orthogonalize: Newton-Schulz steps after the clip, as in Muon (Jordan et al. 2024); 0 for none.
        update_rms: root mean square of a matrix's update before the learning rate; None leaves it as it is.
        nesterov: step along β1 m + (1 − β1) g in place of m, for hidden matrices.
        others: what moves all other parameters: "gradients" is Adam's rule, "curvature" is Sophia's, scaled to
            `update_rms`.
        max_basis_dim: largest side that gets a basis, which costs two square matrices of that size.
        product_dtype: in which rotations and Newton-Schulz steps are computed: torch.bfloat16 is as good and a multiple
            faster where the hardware has it; None is fp32 (fp64 for fp64 parameters).
        estimator: a Gauss-Newton-Bartlett estimator; None is one with random signs.

    The remaining arguments are those of :class:`Sophia`. There are no foreach, fused or capturable paths: products of
    matrices are what a step costs.

    State of a parameter: `step`, `refreshes`, `exp_avg` (m) and `hessian` (D, in the basis) or `exp_avg_sq` (an average
    of squared gradients, in the basis); of a hidden matrix also `row_statistics`, `row_basis`, `column_statistics` and
    `column_basis`, for the sides that are turned.

    Raises:
        ValueError: a setting is out of its range, or a parameter is a DTensor.
    """

    PAPER: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """There is none."""

    _reads_skips = True

    @checks.explain_keywords
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        gamma: float = 0.2,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        curvature_interval: int = 10,
        *,
        hidden: bool = True,
        basis: kronecker.Sides = "smaller",
        factors: Source = "curvature",
        diagonal: Source = "curvature",
        exponent: float = 1.0,
        clip: bool = True,
        orthogonalize: int = 5,
        update_rms: float | None = 0.2,
        nesterov: bool = True,
        others: Source = "gradients",
        max_basis_dim: int = 8192,
        product_dtype: torch.dtype | None = None,
        estimator: GaussNewtonBartlett | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: Literal["mean", "sum", "none"] = "mean",
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        """Build the optimizer; see the class for the arguments."""
        self._settings: dict[str, Any] = {
            "hidden": hidden,
            "basis": basis,
            "factors": factors,
            "diagonal": diagonal,
            "exponent": exponent,
            "clip": clip,
            "orthogonalize": orthogonalize,
            "update_rms": update_rms,
            "nesterov": nesterov,
            "others": others,
            "max_basis_dim": max_basis_dim,
            "product_dtype": product_dtype,
        }
        super().__init__(
            params,
            lr,
            betas,
            gamma,
            eps,
            weight_decay,
            curvature_interval,
            estimator=matrix_checks.checked_estimator(estimator),
            seed=seed,
            process_group=process_group,
            gradient_reduction=gradient_reduction,
            state_dtype=state_dtype,
            maximize=maximize,
            bias_correction=True,
        )

    # ---- curvature

    @property
    def curvature_due(self) -> bool:
        """As of :class:`Sophia`; never, where all that is used is made of gradients."""
        return self._needs_curvature and super().curvature_due

    def update_curvature(self, estimates: Sequence[Tensor | None]) -> bool:
        """Fold curvature in, due or not; counts as a refresh.

        Args:
            estimates: one tensor or None per parameter in the order of the groups: of a hidden matrix sampled gradients
                S_c / √N, [chunks, rows, columns]; of another parameter an estimate of its diagonal.

        Returns:
            False, with nothing changed, when one that is used is not finite on some rank; it is counted as refused.

        Raises:
            ValueError: their number, a shape or a dtype does not fit the parameters (RuntimeError on the other ranks).
        """
        params, replicas, error = self._parameters(), self._replicas(), None
        matrices = {one.p for one in self._members() if one.hidden}
        try:
            matrix_checks.check_estimates(estimates, params, matrices)
        except ValueError as problem:
            error = problem
        replicas.agree(error, [], params[0].device)
        return self._fold_chunks(lambda: _as_chunks(estimates, params, matrices), replicas)

    def _refresh(
        self,
        estimator: Any,
        forward: Any,
        rows: Tensor | Sequence[int] | None,
        replicas: Replicas,
        autocast: Sequence[tuple[str, torch.dtype, bool]] = (),
    ) -> bool:
        params = self._parameters()
        forwards, circumstances = refresh.prepare(
            forward, params, rows=rows, clock=self._clock, replicas=replicas, autocast=autocast
        )
        with fsdp.gathered_anew():
            return self._fold_chunks(lambda: estimator.chunk_gradients(forwards, params, circumstances), replicas)

    @torch.no_grad()
    def _fold_chunks(self, chunks: Callable[[], Chunks], replicas: Replicas) -> bool:
        """Fold sampled gradients in, unless one is not finite on some rank.

        Args:
            chunks: gives the sampled gradients of all parameters and their counts, chunk by chunk, as often as it is
                called. Once in a run that is twice: for the first bases, and for what is measured in them.
            replicas: the ranks.
        """
        first: dict[Tensor, Basis] = {}
        starting = [one for one in self._members() if any(one.sampled_sides) and not self._refreshed(one.p)]
        if starting:
            sums = {one.p: kronecker.Sums(sides=one.sampled_sides) for one in starting}
            self._add_up(sums, chunks())
            if not self._accepted(sums, replicas):
                return False
            with _full_precision(self._parameters()):
                first = {p: one.eigenbasis() for p, one in sums.items() if one.reached}
        sums = {
            one.p: kronecker.Sums(
                basis=first.get(one.p) or kronecker.basis(self.state.get(one.p, {})),
                sides=one.sampled_sides,
                diagonal=one.samples_diagonal,
            )
            for one in self._members()
        }
        total = self._add_up(sums, chunks())
        if not self._accepted(sums, replicas):
            return False
        with _full_precision(self._parameters()):
            for one in self._members():
                if sums[one.p].reached:
                    self._fold_one(one, sums[one.p], 1 / total, first.get(one.p))
        self._reach.update(p for p, one in sums.items() if one.reached)
        self._clock.accept()
        return True

    def _add_up(self, sums: Mapping[Tensor, kronecker.Sums], chunks: Chunks) -> int:
        """Add all chunks to the sums; returns their predictions."""
        total = 0
        for gradients, count in chunks:
            total += count
            with _full_precision(self._parameters()):  # around the arithmetic, not around the forward of the next chunk
                for p, gradient in zip(self._parameters(), gradients, strict=True):
                    if gradient is not None and p in sums:
                        sums[p].add(gradient)
            del gradients  # not beside those of the next chunk
        return total

    def _accepted(self, sums: Mapping[Tensor, kronecker.Sums], replicas: Replicas) -> bool:
        finite = checks.all_finite(total for one in sums.values() for total in one.tensors())
        if replicas.everywhere(finite, self._parameters()[0].device):
            return True
        self._clock.refuse()
        return False

    def _fold_one(self, one: Member, sums: kronecker.Sums, scale: float, first: Basis | None) -> None:
        own = self._state(one.p, one.group)
        decay = state.count_estimate(own, one.group["betas"][1])
        sums.fold_factors(own, weight=1 - decay, scale=scale)
        diagonal = own.get(one.diagonal_name)
        if first is not None:  # what was averaged before, of gradients, was averaged in others
            kronecker.turn(own, None if one.samples_diagonal else diagonal, first)
        if sums.squares is not None:
            update.fold_curvature(
                [own["hessian"]],
                [sums.squares],
                beta2=decay,
                scale=scale,
                scratch=self._scratch,
                keys=[self._rounding_key(one.p, rounding.HESSIAN)],
                step=self._clock.time,
            )
        if any(one.sampled_sides) and first is None:
            kronecker.turn(own, diagonal)

    # ---- step

    def _step_group(
        self,
        group: dict[str, Any],
        paths: dict[torch.device, update.Path],
        *,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        capturing: bool,
    ) -> None:
        assert found_inf is None  # read before
        for p in group["params"]:
            if p.grad is None:
                if p.requires_grad:  # a checkpoint of unused parameters must be loadable, too
                    self._state(p, group)
                continue
            own = self.state[p] if "exp_avg" in self.state[p] else self._state(p, group)
            own["step"] += 1
            scale = None if grad_scale is None else grad_scale.to(p.device)
            update.accumulate_momentum(
                [p.grad],
                [own["exp_avg"]],
                beta1=group["betas"][0],
                maximize=group["maximize"],
                scratch=self._scratch,
                keys=[self._rounding_key(p, rounding.EXP_AVG)],
                step=self._clock.time,
                grad_scale=scale,
            )
            g = p.grad.to(update.compute_dtype(p))
            if scale is not None:
                g = g / scale
            with _full_precision([p]):
                self._move(Member(p, group), own, -g if group["maximize"] else g)

    def _move(self, one: Member, own: dict[str, Any], g: Tensor) -> None:
        """Update one parameter and what follows gradients in its state; curvature that is not known holds it still."""
        p, group = one
        (beta1, beta2), t = group["betas"], int(own["step"])
        m, basis = own["exp_avg"].to(g.dtype), kronecker.basis(own)
        if one.samples_diagonal:
            diagonal = own["hessian"].to(g.dtype)
        else:
            squares = rotate(g, *basis).square()
            if "exp_avg_sq" not in own:  # since 1 - beta2^t corrects an average of t
                own["exp_avg_sq"] = squares * (1 - beta2 ** (t - 1))
            diagonal = own["exp_avg_sq"].mul_(beta2).add_(squares, alpha=1 - beta2) / (1 - beta2**t)
        if p in self._reach:
            if one.hidden:
                u = direction(m.lerp(g, 1 - beta1) if group["nesterov"] else m, diagonal, basis, one.rule)
            elif one.samples_diagonal:
                u = direction(m, diagonal, kronecker.NO_BASIS, one.rule)
            else:
                u = adam(m / (1 - beta1**t), diagonal)
            update.write(p, p.to(g.dtype) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * u)
        if any(one.sides) and group["factors"] == "gradients":
            self._follow(one, own, g, t)

    def _follow(self, one: Member, own: dict[str, Any], g: Tensor, t: int) -> None:
        """Fold a gradient into statistics made of gradients, and move their bases when due."""
        beta2 = one.group["betas"][1]
        kronecker.fold_gradient(own, g, 1 - beta2)
        if t == 1:
            sampled = own["hessian"] if one.samples_diagonal else None
            kronecker.turn(own, sampled, kronecker.eigenbasis(own))
            if sampled is None:  # the one gradient so far is still here: its squares in the new basis
                own["exp_avg_sq"] = rotate(g, *kronecker.basis(own)).square_().mul_(1 - beta2)
        elif t % self._clock.interval == 0:
            kronecker.turn(own, own[one.diagonal_name])

    # ---- stats

    @torch.no_grad()
    def stats(self, reduce: bool = False) -> dict[str, Tensor]:
        """As of :class:`Sophia`; `clip_fraction` counts in the bases, where sampled curvature clips."""
        totals = torch.zeros(4, dtype=torch.float32, device=self._parameters()[0].device)
        for one in self._members():
            own, rule = self.state.get(one.p, {}), one.rule
            if one.p not in self._reach or "hessian" not in own:
                continue
            m, diagonal = (own[name].to(update.compute_dtype(one.p)) for name in ("exp_avg", "hessian"))
            clipped = rotate(m, *kronecker.basis(own)).abs() > bound(diagonal, rule)
            counts = (clipped.sum() * rule.clip, totals.new_tensor(m.numel() * rule.clip))
            totals += torch.stack([x.to(totals) for x in (*counts, m.square().sum(), diagonal.square().sum())])
        return stats.named(totals, self._clock)

    # ---- groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see :meth:`Sophia.add_param_group`."""
        if isinstance(param_group, dict):
            matrix_checks.check_bias_correction(param_group)
        super().add_param_group(param_group)
        self._reach.exempt(one.p for one in self._members() if not one.wants_curvature)

    def _more_defaults(self) -> dict[str, Any]:
        return self._settings

    def _check_settings(self, group: dict[str, Any]) -> None:
        matrix_checks.check_group(group)
        super()._check_settings(group)

    def _shapes(self, p: Tensor, group: Mapping[str, Any]) -> Mapping[str, Sequence[int]]:
        return Member(p, group).shapes()

    def _members(self) -> Iterator[Member]:
        return (Member(p, group) for group in self.param_groups for p in group["params"])

    @property
    def _needs_curvature(self) -> bool:
        return any(one.wants_curvature for one in self._members())

    def _refreshed(self, p: Tensor) -> bool:
        return p in self.state and float(self.state[p].get("refreshes", 0)) > 0

    def _state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = self.state[p]
        Member(p, group).complete(own, self._dtype_of_state(p), state.dtype_of_state(p, None))
        return own

    def _complete_state(self) -> None:
        for one in self._members():
            if self.state.get(one.p):
                self._state(one.p, one.group)
        # Any tensor but one of negative zeros says that curvature has been here.
        self._reach.restore((p, self.state[p]["refreshes"] if self._refreshed(p) else None) for p in self._parameters())
        self._reach.exempt(one.p for one in self._members() if not one.wants_curvature)


@contextlib.contextmanager
def _full_precision(params: Sequence[Tensor]) -> Iterator[None]:
    """Autocast off: its products would be those of low precision."""
    with contextlib.ExitStack() as stack:
        for device_type in {p.device.type for p in params}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _as_chunks(estimates: Sequence[Tensor | None], params: Sequence[Tensor], matrices: set[Tensor]) -> Iterator[Any]:
    """Estimates as sampled gradients: a diagonal is the square of its root, in the first chunk."""
    given = [(e, p, p in matrices) for e, p in zip(estimates, params, strict=True)]
    longest = max((len(e) for e, _, stacked in given if e is not None and stacked), default=1)
    for number in range(longest):
        gradients: list[Tensor | None] = []
        for e, p, stacked in given:
            if e is None or number >= (len(e) if stacked else 1):
                gradients.append(None)
                continue
            exact = e.to(device=p.device, dtype=state.dtype_of_state(p, None))
            gradients.append(exact[number] if stacked else exact.sqrt())
        yield gradients, 1 if number == 0 else 0
