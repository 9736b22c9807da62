"""The optimizers: settings, state and clock around the rule (`update`) and the estimators (`curvature`)."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from sophia.optim import auto_gamma, checks, kernels, refresh, rounding, state, stats, update
from sophia.optim.attach import Attachment
from sophia.optim.clock import FIELDS, Clock, Skips
from sophia.optim.curvature import Estimator, GaussNewtonBartlett, Hutchinson
from sophia.optim.dtensor import local, localise, shard_index
from sophia.optim.reach import Reach
from sophia.optim.replicas import Replicas
from sophia.optim.rows import as_scalar, count_steps, gather, on_device

if TYPE_CHECKING:
    from typing_extensions import Self

_NEVER_REFRESHED = (
    "step() without a curvature refresh would be sign-momentum, not Sophia: at the top of the loop add\n"
    "    optimizer.refresh_curvature(lambda: {returns})\n"
    "or, to leave the loop as it is, build the optimizer with .attach(model). With sophia.integrations:\n"
    "    Lightning:    Trainer(callbacks=[SophiaCallback()]), from sophia.integrations.lightning\n"
    "    Transformers: Trainer(callbacks=[SophiaCallback()]), from sophia.integrations.transformers\n"
    "    Accelerate:   attach(optimizer, model) after prepare, from sophia.integrations.accelerate"
)


# Settings that pickles of earlier versions lack, with what those did.
_LATER_DEFAULTS: Mapping[str, Any] = MappingProxyType({"bias_correction": False, "clip_target": None})


class Sophia(Optimizer):
    """Sophia (Liu et al. 2023, arXiv 2305.14342, Algorithm 3): clipped momentum over rarely estimated curvature.

    With g the gradient and ĥ an estimate of the curvature's diagonal, taken at t = 0, k, 2k, …:

        m ← β1 m + (1 − β1) g
        h ← β2 h + (1 − β2) ĥ                    (every k steps)
        θ ← θ − η λ θ
        θ ← θ − η · clip(m / max(γ h, ε), ±1)    (each coordinate on its own)

    Most users want :class:`SophiaG` or :class:`SophiaH`, which bring their estimator. With `estimator=None` curvature
    comes in through :meth:`update_curvature` only.

    Args:
        params: parameters, named parameters or param groups; groups may set lr, betas, gamma, eps and weight_decay.
        lr: η, the most that a coordinate moves in a step (decay apart); a number or a 0-D tensor.
        betas: (β1, β2), decay of the momentum per step and of the curvature per refresh.
        gamma: γ; right when 10-50 % of the coordinates are *not* clipped, see `stats()["clip_fraction"]`. "auto" sets
            it anew at every refresh that finds momentum, so that `clip_target` of the coordinates are clipped; until
            then it is the paper's. It is in the group: `param_groups[i]["gamma"]`.
        eps: ε, the least denominator.
        weight_decay: λ, decoupled.
        curvature_interval: k, steps from one refresh to the next. One for all groups.
        estimator: where curvature comes from.
        seed: of the estimator's noise; rank and step are mixed in.
        process_group: the ranks that train replicas or shards of one model; None is torch.distributed's default group.
        gradient_reduction: what the engine does to gradients in backward: "mean" (DDP, FSDP2), "sum" (FSDP2 after
            `set_gradient_divide_factor(1)`), or "none" where no engine is at work and curvature gradients are reduced
            here.
        state_dtype: of `exp_avg` and `hessian`; None is fp32, and fp64 for fp64 parameters. bfloat16 takes half the
            memory and is rounded stochastically, so that small updates are not lost; the noise is a function of
            (seed, t, parameter, element). It survives `load_state_dict`.
        maximize: ascend instead of descend; curvature is not flipped.
        foreach: few launches over whole tensors (the default on CUDA where Triton is missing) instead of cache-sized
            slices (the default on the CPU where numba is).
        fused: one pass over memory: on the CPU with numba, on CUDA with Triton. None (and foreach None) takes the
            fastest path that is available for the device.
        capturable: :meth:`step` may be captured in a CUDA graph. t and `step` are then counted on the device; reading
            :attr:`curvature_due` waits for it, and so does `refresh_curvature`, which belongs between replays: a loop
            that counts its replays calls it at every k-th only. The graph freezes what is a number: make lr a tensor on
            the device to schedule it.
        bias_correction: fold the n-th estimate in with 1 − (1 − β2) / (1 − β2ⁿ) in place of β2, so that h is whole from
            the first on: the paper's h over 1 − β2ⁿ. Without it h is 10 % of its value after 10 refreshes at
            β2 = 0.99, 50 % after 69. Not in the paper; may differ between groups.
        clip_target: for gamma="auto": the share of coordinates to clip; None is 0.7. Groups of one target have one γ.

    State of a parameter: `step` (updates it took part in), `exp_avg` (m), `hessian` (h) and with bias_correction
    `refreshes` (estimates that h is the average of). A `hessian` of nothing but negative zeros is curvature that no
    estimate has reached yet; such a parameter holds still.

    The defaults are the paper's. Whatever becomes of them, `**SophiaG.PAPER` (or SophiaH's) after the learning rate is
    the rule exactly as it was published.
    """

    PAPER: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "betas": (0.96, 0.99),
            "gamma": 0.05,
            "eps": 1e-12,
            "weight_decay": 0.2,
            "curvature_interval": 10,
            "bias_correction": False,
        }
    )
    """Keyword arguments of the published rule: all that changes what it computes but lr, which depends on the model."""

    _attachment: Attachment | None

    @checks.explain_keywords
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 6e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float | Literal["auto"] = 0.05,
        eps: float = 1e-12,
        weight_decay: float = 0.2,
        curvature_interval: int = 10,
        *,
        estimator: Estimator | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: Literal["mean", "sum", "none"] = "mean",
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        bias_correction: bool = False,
        clip_target: float | None = None,
    ) -> None:
        """Build the optimizer; see the class for the arguments."""
        checks.check_clock(curvature_interval, seed)
        checks.check_choices(gradient_reduction, state_dtype, estimator)
        self._init_private(estimator, process_group, gradient_reduction, state_dtype)
        self._new_clock: dict[str, int | float] = {
            **FIELDS,
            "curvature_interval": curvature_interval,
            "seed": seed,
        }
        gamma, clip_target = checks.resolved_gamma(gamma, clip_target, start=self.PAPER.get("gamma", 1.0))
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "bias_correction": bias_correction,
            "clip_target": clip_target,
            **self._more_defaults(),
        }
        checks.check_group(defaults)
        super().__init__(checks.checked_params(params), defaults)

    # ---- curvature

    @property
    def curvature_due(self) -> bool:
        """True at t = 0, k, 2k, … until a refresh is accepted in that block of k steps; late is allowed.

        Waits for the device under capturable=True; and once in k steps where `found_inf` makes it skip some.
        """
        return self._clock.due

    @property
    def refreshes(self) -> int:
        """How many refreshes were accepted since the start of training; a state dict keeps it. Waits for nothing."""
        return self._clock.accepted

    def refresh_curvature(
        self,
        forward: Callable[[], Any] | Iterable[Callable[[], Any]],
        *,
        rows: Tensor | Sequence[int] | None = None,
    ) -> bool:
        """Estimate the curvature and fold it in, if that is due; call it at every step, before the forward of the loss.

        (After its backward is as good. Between the two is not, under DDP: its reducer would take the refresh's backward
        pass for the loss's.)

        Leaves `.grad` and the global random generators as it found them. In a distributed run all ranks call it, with
        the same number of forwards. Within a refresh dropout draws from generators seeded by (seed, step, rank).
        Buffers that a forward changes, as BatchNorm's statistics, stay changed: `attach` restores them, or see
        docs/vision.md.

        Args:
            forward: returns the logits of one micro-batch ([..., vocab], an object with `.logits`, or (logits, mask)
                with a bool mask of shape logits.shape[:-1]) for :class:`SophiaG`, the scalar mean loss for
                :class:`SophiaH`. An iterable of such callables gives several chunks. Call the DDP or FSDP2 module
                itself, so that gradients are reduced.
            rows: the global index of every batch row of all forwards in order, so that the noise does not depend on
                which rank holds a row; None counts rows on this rank, and mixes the rank into the noise.

        Returns:
            True when an estimate was folded in; False when none was due, or when it was not finite on some rank. Such
            a refresh is counted in `stats()["refused_refreshes"]` and stays due.

        Raises:
            ValueError: the forward's result does not fit the estimator, or no prediction counts on any rank.
            RuntimeError: another rank failed, or no engine reduced the gradients. Raised on all ranks.
        """
        if not self.curvature_due:
            return False
        return self._refresh(self._required_estimator(), forward, rows, self._replicas())

    def update_curvature(self, estimates: Sequence[Tensor | None]) -> bool:
        """Fold estimates of the curvature's diagonal in, due or not: h ← β2 h + (1 − β2) ĥ. Counts as a refresh.

        Args:
            estimates: one tensor of the parameter's shape, or None, per parameter in the order of the groups; for a
                DTensor parameter a DTensor. The same on all replicas.

        Returns:
            False, with nothing changed, when an estimate is not finite on some rank; it is counted as refused.

        Raises:
            ValueError: their number, a shape or a dtype does not fit the parameters (RuntimeError on the other ranks).
        """
        params, replicas, error = self._parameters(), self._replicas(), None
        try:
            checks.check_estimates(estimates, params)
        except ValueError as problem:
            error = problem
        replicas.agree(error, [], local(params[0]).device)
        with torch.no_grad():
            parts = [None if e is None else localise(e, p) for e, p in zip(estimates, params, strict=True)]
            return self._fold(parts, params, replicas)

    def attach(
        self,
        model: nn.Module,
        logits: Callable[[Any], Any] | None = None,
        mask: Callable[..., Tensor] | None = None,
        max_batch: int = 8,
    ) -> "Self":
        """Refresh inside `step()` from the inputs of the model's last training forward; the loop stays AdamW's.

        Args:
            model: the module that the loop calls: the DDP or FSDP2 module, or a bare one, whose curvature gradients
                are then reduced here. Buffers (BatchNorm's statistics) and random generators are restored after it.
            logits: from the model's output to its logits (SophiaG) or mean loss (SophiaH); None where the output is
                that, or has it as `.logits` or `.loss`.
            mask: from the model's inputs, sliced to `max_batch` rows, to a bool mask of shape logits.shape[:-1]. None
                takes the predictions that the loss in the model's output depends on (−100 among `labels` does not
                count, and labels may be shifted); without labels or a loss all count.
            max_batch: rows of the batch, per rank, that the estimate is made from; all of them where the loss or
                BatchNorm couples rows, as a contrastive loss does.

        Returns:
            The optimizer, so that `SophiaG(model.parameters()).attach(model)` is one line.

        Raises:
            ValueError: the model has none of the parameters, or max_batch is less than 1.
            RuntimeError: attached already, or there is no estimator.
        """
        self._required_estimator()
        if self._attachment is not None:
            raise RuntimeError("this optimizer is attached to a model already: call detach() first")
        checks.check_attach(model, self._parameters(), logits=logits, mask=mask, max_batch=max_batch)
        if mask is not None and self._wants_loss():
            raise ValueError("attach(mask=...) has no meaning for Hutchinson, whose forward gives a loss: leave it out")
        if not self.state:  # an engine may have put other tensors into the groups: Accelerate does, for FSDP2
            self._complete_state()
        self._attachment = Attachment(model, lambda: self.curvature_due, logits=logits, mask=mask, max_batch=max_batch)
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`. Without effect on an optimizer that is not attached."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    # ---- step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step from the gradients in `.grad`. Inspects no value: nothing waits for the device.

        A loop, or `GradScaler`, may set two attributes on the optimizer before the call and delete them after it, as
        with torch's fused optimizers: `found_inf`, a tensor of one number, 0 or else the step is none (no parameter, no
        state and no clock moves; decided on the device), and `grad_scale`, by which gradients are divided. All ranks
        must bring the same `found_inf`.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: no refresh was ever attempted (with every lr 0 it only creates state, which is how
                distributed checkpoints load), a gradient is sparse, or the path asked for cannot run.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = (as_scalar(getattr(self, name, None)) for name in ("found_inf", "grad_scale"))
        paths = [self._paths(group) for group in self.param_groups]
        checks.check_gradients(self._parameters())
        capturing = self._place_clock()
        if self._attachment is not None:
            self._refresh_attached(self._attachment)
        if not self._clock.attempted and self._needs_curvature:
            if not capturing and all(float(group["lr"]) == 0 for group in self.param_groups):
                self._create_state()
                return loss
            raise RuntimeError(self._never_refreshed())
        if found_inf is not None and (self._reads_skips or kernels.readable(found_inf)):
            if found_inf != 0:
                return loss
            found_inf = None
        self._clips.begin(self.param_groups, certain=found_inf is None)
        for group, path in zip(self.param_groups, paths, strict=True):
            self._step_group(group, path, found_inf=found_inf, grad_scale=grad_scale, capturing=capturing)
        self._clock.tick(found_inf)
        if self._needs_curvature:
            self._reach.warn(self._clock, self._named_parameters)
        return loss

    def _step_group(
        self,
        group: dict[str, Any],
        paths: dict[torch.device, update.Path],
        *,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        capturing: bool,
    ) -> None:
        # The device counts a parameter's steps where the host must not know whether one is taken; and on CUDA's fused
        # path, where 148 numbers in main memory would cost the host more than all else.
        always = found_inf is not None or group["capturable"]
        gathered = gather(
            group["params"],
            self.state,
            lambda p: self._state(p, group),
            self._reach,
            lambda p: self._rounding_key(p, rounding.EXP_AVG),
            {device: always or (path == "fused" and device.type == "cuda") for device, path in paths.items()},
        )
        if capturing:
            checks.check_capture(group, holding=sum(len(rows.grads) for rows in gathered.holding.values()))
        beta1, _ = group["betas"]
        for device, rows in gathered.all():
            skip, scale, lr = (on_device(value, device) for value in (found_inf, grad_scale, group["lr"]))
            count_steps(rows.steps, skip)
            shared: dict[str, Any] = {
                "beta1": beta1,
                "maximize": group["maximize"],
                "scratch": self._scratch,
                "keys": rows.keys if rows.rounded else None,
                "step": on_device(self._clock.latest, device) if rows.rounded else 0,
                "found_inf": skip,
                "grad_scale": scale,
            }
            if not rows.params:
                update.accumulate_momentum(rows.grads, rows.exp_avgs, **shared)
                continue
            update.sophia(
                rows.params,
                rows.grads,
                rows.exp_avgs,
                rows.hessians,
                lr=lr,
                gamma=group["gamma"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                path=paths[device],
                clipped=self._clips.counter(device, len(rows.params), fused=paths[device] == "fused"),
                **shared,
            )

    def _place_clock(self) -> bool:
        """Keep the time where this step needs it. Whether a CUDA graph is being captured."""
        device = local(self._parameters()[0]).device
        capturable = [group["capturable"] for group in self.param_groups]
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and not all(capturable):
            raise RuntimeError(
                "step() is called while a CUDA graph is captured, which would freeze the time: build the optimizer "
                "with capturable=True"
            )
        if capturing and not self._clock.on_device:
            raise RuntimeError(
                "step() is captured in a CUDA graph before it has created its state: take some steps (three, as "
                "torch's documentation advises) on a side stream before the capture"
            )
        if not capturing:
            self._clock.place(device if any(capturable) else None)
        return capturing

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by `GradScaler`: whether it leaves unscaling, and skipping steps that overflowed, to this optimizer.

        Only on demand, as torch's optimizers do: with fused=None it is `GradScaler` that unscales and withholds steps,
        and what others build upon that (Lightning's clipping of gradients) goes on working.
        """
        return all(group["fused"] or group["capturable"] for group in self.param_groups)

    # ---- stats

    @torch.no_grad()
    def stats(self, reduce: bool = False) -> dict[str, Tensor]:
        """What the optimizer is doing, as 0-D tensors on the parameters' device, without waiting for it.

        Args:
            reduce: sum over the shards of all ranks (a collective call); else this rank's part.

        Returns:
            clip_fraction: coordinates with |m| > max(γ h, ε), as a fraction of those whose curvature is known.
            momentum_norm, curvature_norm: Euclidean norms of m and h.
            curvature_age: steps since the last accepted refresh.
            refused_refreshes: refreshes refused because an estimate was not finite.
        """
        return stats.summarise(
            self.param_groups,
            self.state,
            clock=self._clock,
            reach=self._reach,
            scratch=self._scratch,
            clips=self._clips,
            replicas=self._replicas() if reduce else None,
        )

    # ---- groups, state and copies

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch's optimizers do; its parameters hold still until the next refresh reaches them."""
        given: dict[str, Any] = {}
        if isinstance(param_group, dict):
            checks.check_group_keys(param_group, self.defaults)
            given = {**param_group}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group.update(self._gamma_of(given))
            self._check_settings(group)
            checks.check_parameters(group["params"])
            checks.check_paths(group)
        except (ValueError, RuntimeError):
            del self.param_groups[-1]
            raise
        time = self.param_groups[0] if len(self.param_groups) > 1 else self._new_clock
        group.update({name: time[name] for name in FIELDS})
        self._reach.add(group["params"])

    def _gamma_of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """γ and its target for a new group of these settings."""
        general = self.defaults["gamma"] if self.defaults["clip_target"] is None else "auto"
        gamma, target = checks.resolved_gamma(
            given.get("gamma", general),
            given.get("clip_target"),
            start=self.PAPER.get("gamma", 1.0),
            fallback=self.defaults["clip_target"],
        )
        return {"gamma": gamma, "clip_target": target}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, on any device; m and h take this optimizer's state dtype, not the parameters'.

        Settings that an older state dict lacks take this optimizer's values, and state that is missing starts anew.
        """
        seen: dict[str, Any] = {}
        own = [{**group} for group in self.param_groups]
        # Ours runs after the user's pre-hooks and before the user's post-hooks, around torch's cast to the parameters'
        # dtype, which would round fp32 curvature to bf16.
        before = self.register_load_state_dict_pre_hook(lambda _, loaded: self._inspect(seen, loaded))
        after = self.register_load_state_dict_post_hook(lambda _: self._adopt(seen, own), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _inspect(self, seen: dict[str, Any], loaded: dict[str, Any]) -> None:
        checks.check_state_dict(loaded, self.param_groups, self._check_settings, self._shapes)
        seen.update(loaded)

    def _adopt(self, loaded: dict[str, Any], own: list[dict[str, Any]]) -> None:
        saved = [index for group in loaded["param_groups"] for index in group["params"]]
        for index, p in zip(saved, self._parameters(), strict=True):
            if index in loaded["state"]:
                state.adopt_state(self.state[p], loaded["state"][index], p, self._dtype_of_state(p))
        steps = [int(one["step"]) for one in self.state.values() if "step" in one]
        state.adopt_settings(self.param_groups, own, steps=max(steps, default=0))
        self._keys.clear()  # the seed may be another
        self._scratch = update.Scratch()  # what it knows of the state's memory is past
        self._clips.forget()
        self._skips = Skips()
        self._complete_state()

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Waits for the device where that counts the steps: what is saved is a number."""
        saved = super().state_dict()
        time = self._clock.time
        for group in saved["param_groups"]:
            group["clock"] = time
        return saved

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the attachment: a copied or unpickled optimizer is unattached."""
        self._clock.settle()
        return {
            **super().__getstate__(),
            "_estimator": self._estimator,
            "_process_group": self._process_group,
            "_gradient_reduction": self._gradient_reduction,
            "_state_dtype": self._state_dtype,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, a copy, or (by torch's load_state_dict) a state dict."""
        super().__setstate__(state)
        if "_scratch" not in self.__dict__:  # unpickled or copied
            for name, value in _LATER_DEFAULTS.items():
                self.defaults.setdefault(name, value)
            for group in self.param_groups:
                for name, value in (*self.defaults.items(), *FIELDS.items()):
                    group.setdefault(name, value)
            self._init_private(self._estimator, self._process_group, self._gradient_reduction, self._state_dtype)
            self._complete_state()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sophia":
        """Copy parameters and state; the process group is a connection, which the copy shares."""
        memo[id(self._process_group)] = self._process_group
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def _init_private(
        self,
        estimator: Estimator | None,
        process_group: dist.ProcessGroup | None,
        gradient_reduction: str,
        state_dtype: torch.dtype | None,
    ) -> None:
        self._estimator = estimator
        self._process_group = process_group
        self._gradient_reduction = gradient_reduction
        self._state_dtype = state_dtype
        self._attachment = None
        self._scratch = update.Scratch()
        self._reach = Reach()
        self._clips = stats.ClipCount()
        self._keys: dict[Tensor, tuple[int, ...]] = {}
        self._skips = Skips()

    def _state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return state.complete(self.state[p], p, self._dtype_of_state(p), counted=group["bias_correction"])

    def _create_state(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._state(p, group)

    def _complete_state(self) -> None:
        """After loading: start what is missing anew, and read from the curvature what was never reached."""
        for group in self.param_groups:
            for p in group["params"]:
                if self.state.get(p):
                    self._state(p, group)
        self._reach.restore((p, self.state[p]["hessian"] if p in self.state else None) for p in self._parameters())

    # ---- private

    _reads_skips: ClassVar[bool] = False
    """Whether a step waits for `found_inf` instead of leaving the decision to the device."""

    def _more_defaults(self) -> dict[str, Any]:
        """Settings of a param group that only a subclass has, with their defaults."""
        return {}

    def _check_settings(self, group: dict[str, Any]) -> None:
        """Refuse settings of a param group that cannot work."""
        checks.check_group(group)

    def _shapes(self, p: Tensor, group: Mapping[str, Any]) -> Mapping[str, Sequence[int]]:
        """Of the tensors in a parameter's state, by name, under the settings of a group."""
        return dict.fromkeys(("exp_avg", "hessian"), p.shape)

    @property
    def _needs_curvature(self) -> bool:
        """Whether a step without any curvature would be another rule."""
        return True

    @property
    def _clock(self) -> Clock:
        return Clock(self.param_groups, self._skips)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _dtype_of_state(self, p: Tensor) -> torch.dtype:
        return state.dtype_of_state(p, self._state_dtype)

    def _rounding_key(self, p: Tensor, which: int) -> int:
        """The key of a parameter's m or h for stochastic rounding."""
        if self._dtype_of_state(p) != torch.bfloat16:
            return 0
        if p not in self._keys:
            for number, q in enumerate(self._parameters()):
                shard = shard_index(q)
                self._keys[q] = tuple(
                    rounding.tensor_key(self._clock.seed, number, state, shard)
                    for state in (rounding.EXP_AVG, rounding.HESSIAN)
                )
        return self._keys[p][which]

    def _paths(self, group: dict[str, Any]) -> dict[torch.device, update.Path]:
        devices = {p.device for p in group["params"]}
        elements = sum(p.numel() for p in self._parameters())
        return {device: checks.resolve_path(group, device.type, elements) for device in devices}

    def _replicas(self) -> Replicas:
        return Replicas(self._process_group, self._gradient_reduction)

    def _required_estimator(self) -> Estimator:
        if self._estimator is None:
            raise RuntimeError(
                "this optimizer has no estimator: build it with estimator=sophia.curvature.GaussNewtonBartlett(), use "
                "SophiaG or SophiaH, or hand curvature to update_curvature()"
            )
        return self._estimator

    def _refresh_attached(self, attachment: Attachment) -> None:
        replicas = self._replicas()
        device = local(self._parameters()[0]).device
        if not self.curvature_due or not replicas.everywhere(attachment.has_inputs, device):
            return
        if not attachment.engine_reduces:
            replicas = Replicas(self._process_group, "none")
        estimator, parts = self._required_estimator(), 1
        if isinstance(estimator, GaussNewtonBartlett):  # slices of the inputs are cheaper chunks than masks
            estimator, parts = dataclasses.replace(estimator, chunks=1), estimator.chunks
        with attachment.replay(parts, with_mask=not self._wants_loss()) as forwards:
            self._refresh(estimator, forwards, None, replicas, attachment.autocast)

    def _refresh(
        self,
        estimator: Estimator,
        forward: Any,
        rows: Tensor | Sequence[int] | None,
        replicas: Replicas,
        autocast: Sequence[tuple[str, torch.dtype, bool]] = (),
    ) -> bool:
        params = self._parameters()
        sums, factor = refresh.estimate(
            estimator, forward, params, rows=rows, clock=self._clock, replicas=replicas, autocast=autocast
        )
        with torch.no_grad():
            return self._fold(sums, params, replicas, factor)

    def _fold(
        self, estimates: Sequence[Tensor | None], params: Sequence[Tensor], replicas: Replicas, factor: float = 1.0
    ) -> bool:
        """Fold local estimates, times a factor, in, unless one is not finite on some rank."""
        device = local(params[0]).device
        if not replicas.everywhere(checks.all_finite(estimates), device):
            self._clock.refuse()
            return False
        reached = {p: e for p, e in zip(params, estimates, strict=True) if e is not None}
        for group in self.param_groups:
            self._fold_group(group, reached, factor)
        self._reach.update(reached)
        self._clips.forget()
        self._clock.accept()
        auto_gamma.adjust(self.param_groups, self.state, self._reach, replicas)
        return True

    def _fold_group(self, group: dict[str, Any], reached: Mapping[Tensor, Tensor], factor: float) -> None:
        paths, (_, beta2) = self._paths(group), group["betas"]
        rows: dict[tuple[torch.device, float], list[tuple[Tensor, Tensor, int]]] = {}
        for p in group["params"]:
            if p not in reached:
                continue
            own = self._state(p, group)
            hessian = local(own["hessian"])
            if p not in self._reach:
                hessian.zero_()  # from the mark of unreached curvature to plain zeros
            row = (hessian, reached[p].to(hessian.device), self._rounding_key(p, rounding.HESSIAN))
            rows.setdefault((p.device, state.count_estimate(own, beta2)), []).append(row)
        for (device, decay), folded in rows.items():
            update.fold_curvature(
                [hessian for hessian, _, _ in folded],
                [estimate for _, estimate, _ in folded],
                beta2=decay,
                scale=factor,
                path=paths[device],
                scratch=self._scratch,
                keys=[key for _, _, key in folded],
                step=self._clock.time,
            )

    def _never_refreshed(self) -> str:
        if self._attachment is not None:
            return (
                "attached, but no training forward of the attached model was seen before step(): attach() the module "
                "that the loop calls (the DDP wrapper, the compiled module), in training mode, before its forward"
            )
        returns = "F.cross_entropy(model(inputs), targets)" if self._wants_loss() else "model(inputs)"
        return _NEVER_REFRESHED.format(returns=returns)

    def _wants_loss(self) -> bool:
        return isinstance(self._estimator, Hutchinson)

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        names: dict[Tensor, str] = {}
        if self._attachment is not None:
            names = {p: name for name, p in self._attachment.model.named_parameters()}
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                given = group["param_names"][index] if "param_names" in group else None
                place = f"parameter {index} of group {number}, shape {tuple(p.shape)}"
                yield given or names.get(p) or place, p
