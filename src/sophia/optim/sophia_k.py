"""Sophia in the curvature's own basis: rotated, clipped and, if wanted, orthogonalized updates of weight matrices."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sophia.optim import (
    adam_step,
    checks,
    fsdp,
    kronecker,
    matrix_checks,
    matrix_owners,
    refresh,
    rounding,
    state,
    stats,
    update,
)
from sophia.optim.curvature import GaussNewtonBartlett
from sophia.optim.dtensor import is_dtensor, local, localise, shard, shards
from sophia.optim.eigenbasis import rotate
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_update import Basis, adam, bound, direction, scaled
from sophia.optim.replicas import Replicas
from sophia.optim.rows import on_device
from sophia.optim.variants import SophiaG

Source = Literal["curvature", "gradients"]
# Elements of matrices that are turned together: three of gpt2-small's largest.
TOGETHER = 1 << 23
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
    and `update_rms=None`, without Nesterov and with others by "curvature", it is SophiaG with bias-corrected curvature.

    Args:
        params: as for :class:`Sophia`; give embeddings and the output head in a group of their own with
            ``"hidden": False``.
        lr: η, of the size of AdamW's: all updates have about AdamW's root mean square.
        betas: (β1, β2), of the momentum per step, and of curvature per refresh (of gradients' statistics per step).
        gamma: γ of the clip, a number.
        eps: ε, the least denominator; that of Adam's rule is 1e-8.
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

    Under FSDP2 each hidden matrix has one rank that puts its shards together, turns them, and alone holds diagonal,
    statistics and bases: memory and work are dealt to the ranks. In each step momenta travel there, and updates back.

    State of a parameter: `step`, `refreshes`, `exp_avg` (m) and `hessian` (D, in the basis) or `exp_avg_sq` (an average
    of squared gradients, in the basis); of a hidden matrix also `row_statistics`, `row_basis`, `column_statistics` and
    `column_basis`, for the sides that are turned.

    Raises:
        ValueError: a setting is out of its range, or a hidden matrix is a DTensor that is cut along two dimensions of
            its mesh (FSDP2 with tensor parallelism).
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
            "product_dtype": product_dtype if product_dtype is None else str(product_dtype).removeprefix("torch."),
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
                S_c / √N, [chunks, rows, columns], whole also where the matrix is sharded; of another parameter an
                estimate of its diagonal, a DTensor where the parameter is one.

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
                called. That is twice where matrices get their first bases: for these, and for what is measured in them.
            replicas: the ranks.
        """
        first: dict[Tensor, Basis] = {}
        starting = {one.p for one in self._members() if any(one.sampled_sides) and not self._refreshed(one.p)}
        sums = {one.p: self._begun(one, first, factors_only=one.p in starting) for one in self._members()}
        total = self._add_up(sums, chunks())
        if not self._accepted(sums, replicas):
            return False
        if any(sums[p].reached for p in starting):  # a matrix that no gradient ever reaches costs nothing
            with _full_precision(self._parameters()):
                found = [one for one in self._members() if one.p in starting and one.here and sums[one.p].reached]
                first = {one.p: sums[one.p].eigenbasis() for one in found}
            sums = {one.p: self._begun(one, first) for one in self._members()}
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

    def _begun(self, one: Member, first: Mapping[Tensor, Basis], *, factors_only: bool = False) -> kronecker.Sums:
        """Nothing yet of what a parameter wants, in its first basis or else the one that it has."""
        return kronecker.Sums(
            basis=first.get(one.p) or kronecker.basis(self.state.get(one.p, {})),
            sides=one.sampled_sides,
            diagonal=one.samples_diagonal and not factors_only,
        )

    def _add_up(self, sums: Mapping[Tensor, kronecker.Sums], chunks: Chunks) -> int:
        """Add all chunks to the sums; returns their predictions."""
        total = 0
        for gradients, count in chunks:
            total += count
            with _full_precision(self._parameters()):  # around the arithmetic, not around the forward of the next chunk
                self._add_chunk(sums, gradients)
            del gradients  # not beside those of the next chunk
        return total

    def _add_chunk(self, sums: Mapping[Tensor, kronecker.Sums], gradients: Sequence[Tensor | None]) -> None:
        found = {p: g for p, g in zip(self._parameters(), gradients, strict=True) if g is not None and p in sums}
        members = [one for one in self._members() if one.p in found]
        for one in members:
            sums[one.p].reached = True
        for several in _rounds(one for one in members if sums[one.p].wants_any):
            whole = _gathered(several, [found[one.p] for one in several])
            for one in several:
                if one.here and whole is not None:
                    sums[one.p].add(whole)

    def _accepted(self, sums: Mapping[Tensor, kronecker.Sums], replicas: Replicas) -> bool:
        finite = checks.all_finite(total for one in sums.values() for total in one.tensors())
        if replicas.everywhere(finite, self._parameters()[0].device):
            return True
        self._clock.refuse()
        return False

    def _fold_one(self, one: Member, sums: kronecker.Sums, scale: float, first: Basis | None) -> None:
        own = self._state(one.p, one.group)
        decay = state.count_estimate(own, one.group["betas"][1])
        if not one.here:
            return
        sums.fold_factors(own, weight=1 - decay, scale=scale)
        diagonal = own.get(one.diagonal_name)
        if first is not None:  # what was averaged before, of gradients, was averaged in others
            kronecker.turn(own, None if one.samples_diagonal else diagonal, first)
        if sums.squares is not None:
            update.fold_curvature(
                [local(own["hessian"])],
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
        moving: list[Member] = []
        whole: list[Member] = []  # Adam's, in one call
        for p in group["params"]:
            if p.grad is None:
                if p.requires_grad:  # a checkpoint of unused parameters must be loadable, too
                    self._state(p, group)
                continue
            own = self.state[p] if "exp_avg" in self.state[p] else self._state(p, group)
            one = self._member(p, group)
            if grad_scale is None and adam_step.fits(one, own):  # the kernel would unscale the user's gradients
                whole.append(one)
                continue
            own["step"] += 1
            update.accumulate_momentum(
                [localise(p.grad, p)],
                [local(own["exp_avg"])],
                beta1=group["betas"][0],
                maximize=group["maximize"],
                scratch=self._scratch,
                keys=[self._rounding_key(p, rounding.EXP_AVG)],
                step=self._clock.time,
                grad_scale=None if grad_scale is None else grad_scale.to(p.device),
            )
            moving.append(one)
        adam_step.take(whole, self.state, group)
        with _full_precision(group["params"]):
            self._move_others([one for one in moving if not one.hidden], grad_scale)
            hidden = [one for one in moving if one.hidden]
            for several in _alike(one for one in hidden if one.place is None):
                self._move_whole(several, [_gradient(one, grad_scale) for one in several])
            for several in _rounds(one for one in hidden if one.place is not None):
                self._move_sharded(several, [_gradient(one, grad_scale) for one in several])

    def _move_others(self, members: Iterable[Member], grad_scale: Tensor | None) -> None:
        """Update parameters that are no hidden matrices, entry by entry, and what follows gradients in their state.

        Curvature that is not known holds them still.
        """
        shared: list[tuple[Member, Tensor]] = []
        for one in members:
            own, g, rms = self.state[one.p], _gradient(one, grad_scale), one.group["update_rms"]
            m, diagonal = local(own["exp_avg"]).to(g.dtype), self._diagonal(one, own, g)
            if one.p not in self._reach:
                continue
            if not one.samples_diagonal:
                _write(one, adam(m / (1 - one.group["betas"][0] ** int(own["step"])), diagonal))
            elif rms is None or shards(one.p) == 1:
                u = direction(m.reshape(1, -1), diagonal.reshape(1, -1), kronecker.NO_BASIS, one.rule)
                _write(one, u.reshape(m.shape))
            else:  # other shards count, too
                shared.append((one, direction(m, diagonal, kronecker.NO_BASIS, replace(one.rule, update_rms=None))))
        if shared:
            replicas = self._replicas()
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
        for one, g in zip(several, gradients, strict=True):
            diagonal = self._diagonal(one, self.state[one.p], g)
            if one.p in self._reach:
                moving.append(one)
                along.append(_along(one, self.state[one.p], g))
                diagonals.append(diagonal)
        if moving:
            bases = zip(*(kronecker.basis(self.state[one.p]) for one in moving), strict=True)
            rows, columns = (_stacked(side) for side in bases)
            x, diagonal = torch.stack(along), torch.stack(diagonals)
            for one, u in zip(moving, direction(x, diagonal, (rows, columns), moving[0].rule), strict=True):
                _write(one, u)
        for one, g in zip(several, gradients, strict=True):
            self._follow(one, self.state[one.p], g)

    def _move_sharded(self, several: Sequence[Member], gradients: Sequence[Tensor]) -> None:
        """The same of matrices in shards, each of them where it is put together.

        Args:
            several: a round, of which at most one matrix is put together here.
            gradients: of the matrices, this rank's parts.
        """
        given = dict(zip((one.p for one in several), gradients, strict=True))
        mine = next((one for one in several if one.here), None)
        following = [one for one in several if one.follows_gradients]
        g = _gathered(following, [given[one.p] for one in following])
        diagonal = None if mine is None else self._diagonal(mine, self.state[mine.p], g)
        moving = [one for one in several if one.p in self._reach]
        x = _gathered(moving, [_along(one, self.state[one.p], given[one.p]) for one in moving])
        u = None
        if mine is not None and x is not None and diagonal is not None:
            u = direction(x, diagonal, kronecker.basis(self.state[mine.p]), mine.rule)
        for one, part in zip(moving, _scattered(moving, u, gradients[0]), strict=True):
            _write(one, part)
        if mine is not None and g is not None:
            self._follow(mine, self.state[mine.p], g)

    def _diagonal(self, one: Member, own: dict[str, Any], g: Tensor | None) -> Tensor:
        """D, after this step's gradient where it is made of gradients."""
        if one.samples_diagonal:
            return local(own["hessian"]).to(update.compute_dtype(one.p))
        assert g is not None
        beta2, t = one.group["betas"][1], int(own["step"])
        squares = rotate(g, *kronecker.basis(own)).square()
        if "exp_avg_sq" not in own:  # since 1 - beta2^t corrects an average of t
            own["exp_avg_sq"] = one.zeros("exp_avg_sq", g.dtype)
            local(own["exp_avg_sq"]).add_(squares, alpha=1 - beta2 ** (t - 1))
        average = local(own["exp_avg_sq"]).mul_(beta2).add_(squares, alpha=1 - beta2)
        corrected: Tensor = average / (1 - beta2**t)
        return corrected

    def _follow(self, one: Member, own: dict[str, Any], g: Tensor) -> None:
        """Fold a gradient into statistics made of gradients, and move their bases when due."""
        if not any(one.sides) or one.group["factors"] != "gradients":
            return
        beta2, t = one.group["betas"][1], int(own["step"])
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
        """As of :class:`Sophia`; `clip_fraction` counts in the bases, where sampled curvature clips.

        Args:
            reduce: as of :class:`Sophia`. Without it a sharded hidden matrix, which no rank has whole, is left out of
                `clip_fraction`.
        """
        totals = torch.zeros(4, dtype=torch.float32, device=self._parameters()[0].device)
        members = [
            one
            for one in self._members()
            if one.p in self._reach and one.samples_diagonal and "exp_avg" in self.state.get(one.p, {})
        ]
        replicas = self._replicas() if reduce and any(shards(p) > 1 for p in self._parameters()) else None
        for several in _rounds(members) if replicas else [[one] for one in members]:
            momenta = [local(self.state[one.p]["exp_avg"]).to(update.compute_dtype(one.p)) for one in several]
            m = _gathered(several, momenta) if replicas else momenta[0]
            for one in several:
                if m is not None and (one.here or not replicas):
                    weight = replicas.shard_weight(one.p) if replicas else 1.0
                    totals += self._sums(one, m).to(totals) * weight
        return stats.named(totals if replicas is None else replicas.sum_shards(totals), self._clock)

    def _sums(self, one: Member, m: Tensor) -> Tensor:
        """Clipped coordinates, all coordinates, Σ m² and Σ D² of a parameter, or of what there is of it here: [4]."""
        own, rule = self.state[one.p], one.rule
        clipped = count = curvature = m.new_zeros(())
        if one.here:
            diagonal = local(own["hessian"]).to(m.dtype)
            curvature = diagonal.square().sum()
            if m.shape == diagonal.shape and rule.clip:
                clipped = (rotate(m, *kronecker.basis(own)).abs() > bound(diagonal, rule)).sum()
                count = m.new_full((), m.numel())
        return torch.stack([x.to(m.dtype) for x in (clipped, count, m.square().sum(), curvature)])

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

    def _init_private(self, *settings: Any) -> None:
        super()._init_private(*settings)
        self._places: dict[Tensor, matrix_owners.Place | None] = {}

    def _members(self) -> Iterator[Member]:
        return (self._member(p, group) for group in self.param_groups for p in group["params"])

    def _member(self, p: Tensor, group: Mapping[str, Any]) -> Member:
        if p not in self._places:
            every = [[Member(q, one) for q in one["params"]] for one in self.param_groups]
            owned = matrix_owners.assign([one.p for one in members if one.hidden] for members in every)
            self._places = {q: owned.get(q) for q in self._parameters()}
        return Member(p, group, self._places[p])

    @property
    def _needs_curvature(self) -> bool:
        return any(one.wants_curvature for one in self._members())

    def _refreshed(self, p: Tensor) -> bool:
        return p in self.state and float(self.state[p].get("refreshes", 0)) > 0

    def _state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = self.state[p]
        self._member(p, group).complete(own, self._dtype_of_state(p), state.dtype_of_state(p, None))
        return own

    def state_dict(self) -> dict[str, Any]:
        """As torch's; complete on every rank.

        Under FSDP2 all ranks call it: what only one of them holds is copied to all, as plain tensors, so that any
        number of ranks can load it.
        """
        saved = super().state_dict()
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        spread = [(index, one) for index, one in zip(indices, self._members(), strict=True) if one.place is not None]
        if not spread:
            return saved
        present = [[int(name in saved["state"].get(index, {})) for name in one.shapes()] for index, one in spread]
        everywhere = self._replicas().gather(
            [flag for flags in present for flag in flags], self._parameters()[0].device
        )
        flags = iter([any(theirs) for theirs in zip(*everywhere, strict=True)])
        for index, one in spread:
            held = {name: shape for name, shape in one.shapes().items() if next(flags) and name != "exp_avg"}
            if held:
                saved["state"][index] = {**saved["state"][index], **self._copies(one, held)}
        return saved

    def _copies(self, one: Member, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """What the owner of a matrix holds of its state, on every rank."""
        assert one.place is not None
        own = self.state[one.p]
        copies: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            dtype = self._dtype_of_state(one.p) if name == "hessian" else state.dtype_of_state(one.p, None)
            like = torch.empty(tuple(shape), dtype=dtype, device=one.p.device)
            copies[name] = matrix_owners.copied(one.place, own.get(name), like)
        return copies

    def _complete_state(self) -> None:
        self._places.clear()  # parameters, and which matrices are hidden, may be others
        for one in self._members():
            if self.state.get(one.p):
                one.put_together(self.state[one.p])
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


def _alike(members: Iterable[Member]) -> Iterable[Sequence[Member]]:
    """Matrices of a group that are alike in shape, dtype and device, but not so many that copies of them weigh."""
    found: dict[Any, list[Member]] = {}
    for one in members:
        kind = (one.p.shape, update.compute_dtype(one.p), one.p.device)
        several = found.setdefault(kind, [])
        if (len(several) + 1) * one.p.numel() > TOGETHER and several:
            yield several
            several = found[kind] = []
        several.append(one)
    yield from found.values()


def _stacked(side: Sequence[Tensor | None]) -> Tensor | None:
    """The bases of one side of several matrices; of all or none there is one."""
    present = [one for one in side if one is not None]
    return torch.stack(present) if present else None


def _rounds(members: Iterable[Member]) -> list[list[Member]]:
    return matrix_owners.rounds((one, update.compute_dtype(one.p)) for one in members)


def _gathered(several: Sequence[Member], parts: Sequence[Tensor]) -> Tensor | None:
    return matrix_owners.gathered([one.place for one in several], parts)


def _scattered(several: Sequence[Member], whole: Tensor | None, like: Tensor) -> list[Tensor]:
    return matrix_owners.scattered([one.place for one in several], whole, like)


def _gradient(one: Member, grad_scale: Tensor | None) -> Tensor:
    """This rank's part of the gradient, as the rule takes it."""
    assert one.p.grad is not None
    g = localise(one.p.grad, one.p).to(update.compute_dtype(one.p))
    if grad_scale is not None:
        g = g / grad_scale.to(g.device)
    return -g if one.group["maximize"] else g


def _along(one: Member, own: Mapping[str, Any], g: Tensor) -> Tensor:
    """What a hidden matrix steps along: of this rank's part, from momentum and gradient."""
    m = local(own["exp_avg"]).to(g.dtype)
    return m.lerp(g, 1 - one.group["betas"][0]) if one.group["nesterov"] else m


def _write(one: Member, u: Tensor) -> None:
    """θ ← θ − η λ θ − η u, of this rank's part."""
    p, lr = local(one.p), one.group["lr"]
    if isinstance(lr, Tensor):
        lr = on_device(lr.reshape(()), p.device)
    update.write(p, p.to(u.dtype) * (1 - lr * one.group["weight_decay"]) - lr * u)


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
            whole = e.full_tensor() if stacked and is_dtensor(e) else e
            part = shard(whole[number], p) if stacked else localise(e, p)
            exact = part.to(device=p.device, dtype=state.dtype_of_state(p, None))
            gradients.append(exact if stacked else exact.sqrt())
        yield gradients, 1 if number == 0 else 0
