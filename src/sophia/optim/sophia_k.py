"""Sophia in the curvature's own basis: rotated, clipped and, if wanted, orthogonalized updates of weight matrices."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from sophia.optim import (
    adam_step,
    checks,
    fsdp,
    kronecker,
    matrix_checks,
    matrix_groups,
    matrix_owners,
    matrix_state,
    matrix_stats,
    refresh,
    rounding,
    state,
    stats,
    update,
)
from sophia.optim.curvature import GaussNewtonBartlett
from sophia.optim.dtensor import shards
from sophia.optim.matrix_bounds import Bounds
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_passes import Passes, fuses
from sophia.optim.matrix_refresh import Chunks, MatrixRefresh, as_chunks, refreshed
from sophia.optim.matrix_step import MatrixStep
from sophia.optim.matrix_step import together as together
from sophia.optim.replicas import Replicas
from sophia.optim.variants import SophiaG

if TYPE_CHECKING:
    from typing_extensions import Self

Source = Literal["curvature", "gradients"]


class SophiaK(SophiaG):
    """Sophia in the curvature's own basis, matrix by matrix (ours; docs/lab-notes.md tells how it was found).

    Every k steps a sub-batch gives sampled Gauss-Newton gradients S_c, as for :class:`SophiaG`. Of a hidden layer's
    matrix they give the Kronecker factors Σ S_c S_cᵀ / N and Σ S_cᵀ S_c / N, whose eigenvectors Q_R and Q_C are a basis
    in which curvature is nearly diagonal, and that diagonal D. In each step

        m ← β1 m + (1 − β1) g
        u ← clip(Q_Rᵀ m Q_C / max(γ Dᵖ, ε), ±1)
        u ← Q_R u Q_Cᵀ, orthogonalized by Newton-Schulz steps, scaled to a root mean square of 0.1
        θ ← θ − η λ θ − η u

    All else (embeddings, the output head, vectors) takes Adam's rule or Sophia's, see `others`; :meth:`groups` tells
    it apart. Refreshes, clock, attach, groups and state dicts are those of :class:`Sophia`. With the identity as basis,
    p = 1, no orthogonalization and `update_rms=None`, without Nesterov and with others by "curvature", it is SophiaG
    with bias-corrected curvature.

    Example:
        >>> optimizer = SophiaK(SophiaK.groups(model), lr=1e-3).attach(model)

    Args:
        params: as for :class:`Sophia`, and best what :meth:`groups` gives: embeddings and the output head are matrices,
            too, and belong into a group with ``"hidden": False``.
        lr: η, of the size of AdamW's, which best has twice as much or more: a matrix's update is half as long as its.
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
        nu: ν, the share of the momentum in what Adam's rule steps along, ν m + (1 − ν) g (quasi-hyperbolic: Ma and
            Yarats 2019, arXiv 1810.06801); 1 is Adam's own.
        rtol: as of torch.linalg.pinv: a direction of a basis whose mean curvature is less than this part of the
            matrix's was not measured, and takes the matrix's mean for its own. Else rounding errors over rounding
            errors would be clipped to full steps where no gradient enters, as in one direction beside each LayerNorm.
        split: matrices of one shape that lie beside each other in a weight, along its longer side, and are each turned
            and orthogonalized on their own: 3 for fused queries, keys and values ([3w, w], GPT-2's `c_attn`, torch's
            `in_proj_weight`), in a group of such weights. The basis of the shorter side, their common inputs, is one
            for all, and the one that "smaller" takes where each of them is square.
        max_basis_dim: largest side that gets a basis, which costs two square matrices of that size.
        product_dtype: in which rotations, quotients and Newton-Schulz steps are computed: torch.bfloat16 is a multiple
            faster where the hardware has it, for rounding errors of a few per cent of an update; "auto" takes it there
            in place of fp32 (CUDA from compute capability 8 on, CPUs with AMX). None is fp32, or fp64 for fp64
            parameters.
        estimator: a Gauss-Newton-Bartlett estimator; None is one with random signs.
        fused: whether what is done entry by entry (momenta, Adam's rule, adding the update) is one pass over memory
            each, for parameters on the CPU, with numba; None where that is worth it.

    The remaining arguments are those of :class:`Sophia`. There are no foreach or capturable paths: products of matrices
    are what a step costs.

    Under FSDP2 each hidden matrix has one rank that puts its shards together, turns them, and alone holds diagonal,
    statistics and bases: memory and work are dealt to the ranks. In each step momenta travel there, and updates back.

    State of a parameter: `step`, `refreshes`, `exp_avg` (m) and `hessian` (D, in the basis) or `exp_avg_sq` (an average
    of squared gradients, in the basis); of a hidden matrix also `row_statistics`, `row_basis`, `column_statistics` and
    `column_basis`, for the sides that are turned.

    Raises:
        ValueError: a setting is out of its range, or has no effect beside the others; or a hidden matrix is a DTensor
            that is cut along two dimensions of its mesh (FSDP2 with tensor parallelism).
    """

    PAPER: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """There is none."""

    _reads_skips = True

    @checks.explain_keywords
    @matrix_checks.refuse_idle
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        gamma: float = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        curvature_interval: int = 10,
        *,
        hidden: bool = True,
        basis: kronecker.Sides = "smaller",
        factors: Source = "curvature",
        diagonal: Source = "curvature",
        exponent: float = 0.5,
        clip: bool = True,
        orthogonalize: int = 5,
        update_rms: float | None = 0.1,
        nesterov: bool = True,
        others: Source = "gradients",
        nu: float = 0.5,
        rtol: float = 1e-4,
        split: int = 1,
        max_basis_dim: int = 8192,
        product_dtype: torch.dtype | Literal["auto"] | None = None,
        estimator: GaussNewtonBartlett | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: Literal["mean", "sum", "none"] = "mean",
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        fused: bool | None = None,
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
            "nu": nu,
            "rtol": rtol,
            "split": split,
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
            fused=fused,
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
        return self._fold_chunks(lambda: as_chunks(estimates, params, matrices), replicas)

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
            chunks = functools.partial(estimator.chunk_gradients, forwards, params, circumstances)
            return self._fold_chunks(chunks, replicas)

    def _fold_chunks(self, chunks: Callable[[], Chunks], replicas: Replicas) -> bool:
        self._bounds.clear()
        return MatrixRefresh(
            members=list(self._members()),
            states=self.state,
            begin=lambda one: self._state(one.p, one.group),
            unturned=self._unturned,
            reach=self._reach,
            clock=self._clock,
            replicas=replicas,
            scratch=self._scratch,
            key=lambda p: self._rounding_key(p, rounding.HESSIAN),
        ).fold(chunks)

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
            moving.append(one)
        adam_step.take(whole, self.state, group)
        MatrixStep(
            states=self.state,
            reach=self._reach,
            unturned=self._unturned,
            interval=self._clock.interval,
            replicas=self._replicas,
            bounds=self._bounds,
            passes=Passes(
                states=self.state,
                scratch=self._scratch,
                key=lambda p: self._rounding_key(p, rounding.EXP_AVG),
                time=self._clock.time,
                grad_scale=grad_scale,
                fused={device for device, path in paths.items() if path == "fused" and fuses(device)},
            ),
        ).move(moving)

    # ---- stats

    @torch.no_grad()
    def stats(self, reduce: bool = False) -> dict[str, Tensor]:
        """As of :class:`Sophia`; `clip_fraction` counts in the bases, where sampled curvature clips.

        Args:
            reduce: as of :class:`Sophia`. Without it a sharded hidden matrix, which no rank has whole, is left out of
                `clip_fraction`.
        """
        members = [
            one
            for one in self._members()
            if one.p in self._reach and one.samples_diagonal and "exp_avg" in self.state.get(one.p, {})
        ]
        sharded = any(shards(p) > 1 for p in self._parameters())
        replicas = self._replicas() if reduce and sharded else None
        device = self._parameters()[0].device
        return stats.named(matrix_stats.totals(members, self.state, replicas, device), self._clock)

    # ---- groups and state

    @staticmethod
    def groups(
        model: nn.Module,
        *,
        exclude: Sequence[str] = (),
        head: nn.Module | Literal["auto"] | None = "auto",
        split: Mapping[str, int] | Literal["auto"] | None = None,
    ) -> list[dict[str, Any]]:
        """The model's parameters in groups: hidden layers' matrices, other matrices, vectors.

        Hidden are all weights with two dimensions but those of embeddings, of the output head, tied or not, and those
        excluded. (An embedding that is a bare parameter of the model's own has to be excluded by name.) The others have
        betas of their own, 0.9 and 0.98; vectors do not decay.

        Args:
            model: whole, or in its wrapper (DDP, FSDP2, torch.compile).
            exclude: shell wildcards on names of parameters that are not to count as hidden, ``["positions", "cnn.*"]``.
            head: the output layer; "auto" takes what the model's `get_output_embeddings()` gives (transformers), a
                linear layer with an embedding's weight, the last one with a row for each of the vocabulary, or in a
                model without embeddings the last one; None for no layer but embeddings.

            split: hidden weights that are several matrices beside each other, see the argument of that name, as
                {pattern on names: number}, ``{"*.c_attn.weight": 3}``; they get groups of their own. "auto" takes fused
                queries, keys and values by the names that are usual for them. None for none.

        Returns:
            Groups as :class:`SophiaK` takes them; add settings of your own to any of them.

        Raises:
            ValueError: a pattern matches nothing, or no head is found.
        """
        return matrix_groups.matrix_groups(model, exclude=exclude, head=head, split=split)

    def attach(
        self,
        model: nn.Module,
        logits: Callable[[Any], Any] | None = None,
        mask: Callable[..., Tensor] | None = None,
        max_batch: int = 8,
    ) -> "Self":
        """As :meth:`Sophia.attach`; refuses a model with an embedding among the hidden matrices (ValueError)."""
        if isinstance(model, nn.Module):
            matrix_checks.check_embeddings(
                {one.p for one in self._members() if one.hidden}, matrix_groups.embeddings(model)
            )
        return super().attach(model, logits, mask, max_batch)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see :meth:`Sophia.add_param_group`."""
        if isinstance(param_group, dict):
            matrix_checks.check_bias_correction(param_group)
            matrix_checks.check_idle(param_group, self.defaults)
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
        # Matrices whose bases are none yet: their state is of SophiaG, or their eigenvectors were not found.
        self._unturned: set[Tensor] = set()
        self._bounds = Bounds()

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

    def _state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = self.state[p]
        self._member(p, group).complete(own, self._dtype_of_state(p), state.dtype_of_state(p, None))
        return own

    def __getstate__(self) -> dict[str, Any]:
        """As of :class:`Sophia`."""
        return {**super().__getstate__(), "_unturned": self._unturned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As of :class:`Sophia`."""
        super().__setstate__(state)
        if "_unturned" in state:  # a copy or a pickle: what one rank has of a matrix would not tell
            self._unturned = set(state["_unturned"])

    def state_dict(self) -> dict[str, Any]:
        """As torch's; complete on every rank.

        Under FSDP2 all ranks call it: what only one of them holds is copied to all, as plain tensors, so that any
        number of ranks can load it.
        """
        saved = super().state_dict()
        dtypes = {p: self._dtype_of_state(p) for p in self._parameters()}
        return matrix_state.completed(saved, list(self._members()), self.state, dtypes, self._replicas())

    def _complete_state(self) -> None:
        self._places.clear()  # parameters, and which matrices are hidden, may be others
        self._bounds.clear()
        self._unturned.clear()
        for one in self._members():
            if self.state.get(one.p):
                one.put_together(self.state[one.p])
                if one.lacks_bases(self.state[one.p]):
                    self._unturned.add(one.p)
                self._state(one.p, one.group)
        # Any tensor but one of negative zeros says that curvature has been here.
        self._reach.restore(
            (p, self.state[p]["refreshes"] if refreshed(self.state, p) else None) for p in self._parameters()
        )
        self._reach.exempt(one.p for one in self._members() if not one.wants_curvature)
